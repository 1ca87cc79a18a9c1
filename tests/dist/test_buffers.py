"""A router's buffer: stepped after each optimizer step, saved, resumed on another layout, read alone."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv2.config.schema import ModelConfig
from dsv2.kernels.sets import KernelSet
from dsv2.moe.routers.softmax_topk_module import SoftmaxTopKRouter
from tests.dist import jobs

SAVE_AT = 2
STEPS = 3


class CountingGate(SoftmaxTopKRouter):
    """A gate that counts its layer's load, beside a constant that it starts with."""

    load_E: Tensor
    start_2: Tensor

    def __init__(self, model: ModelConfig, kernels: KernelSet):
        super().__init__(model, kernels)
        self.register_buffer("load_E", torch.zeros(model.n_routed_experts))
        self.register_buffer("start_2", torch.tensor([0.5, 1e-3], device="cpu"))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def after_step(self, load_E: Tensor) -> None:
        self.load_E += load_E


def counting(layer_class: Any) -> Any:
    """Return the MoE layer's class with that gate."""

    class CountingLayer(layer_class):
        def __init__(self, config: Any, execution: Any):
            super().__init__(config, execution)
            self.gate = CountingGate(config, execution.kernels)

    return CountingLayer


def make_engine(rank: int, world_size: int, **layout: Any) -> Any:
    from dsv2.moe.engine_layer import EngineMoELayer

    with patch("dsv2.training.build.EngineMoELayer", counting(EngineMoELayer)):
        return jobs.make_engine(rank, world_size, **layout)


def buffers_of(engine: Any) -> dict[str, np.ndarray]:
    for name, buffer in engine.model.named_buffers():
        assert buffer.dtype == torch.float32, name
    return {name: buffer.numpy().copy() for name, buffer in engine.model.named_buffers()}


def train_and_save(rank: int, world_size: int, folder: str, **layout: Any) -> dict[str, np.ndarray]:
    from dsv2.checkpoint.state import RunState
    from dsv2.checkpoint.store import CheckpointStore

    engine = make_engine(rank, world_size, **layout)
    jobs.steps_of(engine, 0, SAVE_AT, layout["micro_batch"])
    with torch.no_grad():
        for layer in engine.model.modules():
            if isinstance(layer, CountingGate):
                layer.start_2[0] = 0.75
    jobs.save(engine, CheckpointStore(Path(folder), 3, jobs.SETTINGS), RunState(step=SAVE_AT))
    return buffers_of(engine)


def load_and_train(rank: int, world_size: int, path: str, **layout: Any) -> tuple[dict, dict]:
    from dsv2.checkpoint.state import Found, RunState
    from dsv2.checkpoint.store import CheckpointStore

    engine = make_engine(rank, world_size, **layout)
    engine.load(
        CheckpointStore(Path(path).parent, 3, jobs.SETTINGS), Found(Path(path), RunState(), [], [], {})
    )
    loaded = buffers_of(engine)
    jobs.steps_of(engine, SAVE_AT, STEPS - SAVE_AT, layout["micro_batch"])
    return loaded, buffers_of(engine)


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"),
    [
        ({"ep": 2, "stage": 1, "micro_batch": 2}, {"ep": 1, "stage": 3, "micro_batch": 4}),
        (
            {"ep": 1, "stage": 1, "micro_batch": 1, "bf16": True},
            {"ep": 2, "stage": 2, "micro_batch": 2, "bf16": True},
        ),
    ],
)
def test_stepped_saved_resumed_and_read(pools, tmp_path, saved_on, loaded_on):
    from dsv2.inference.model import load_model
    from dsv2.moe.layer import MoELayer

    job = "tests.dist.test_buffers:train_and_save"
    saved = pools[2].run(job, folder=str(tmp_path), **saved_on)
    path = tmp_path / f"step-{SAVE_AT:08d}"
    resumed = pools[2].run("tests.dist.test_buffers:load_and_train", path=str(path), **loaded_on)
    with patch("dsv2.model.block.MoELayer", counting(MoELayer)):
        read = {name: buffer.numpy() for name, buffer in load_model(path, torch.bfloat16).named_buffers()}
    routing = jobs.reference(STEPS).routing
    for layer in (1, 2):
        gate = f"model.layers.{layer}.mlp.gate"
        if "bf16" not in saved_on:
            loads = np.stack([step["load_E"][layer - 1] for step in routing])
            expected = [loads[:steps].sum(axis=0) for steps in (SAVE_AT, STEPS)]
            np.testing.assert_array_equal(saved[0][f"{gate}.load_E"], expected[0])
            np.testing.assert_array_equal(resumed[0][1][f"{gate}.load_E"], expected[1])
        pairs = jobs.BATCH * jobs.SEQUENCE * 3
        assert saved[0][f"{gate}.load_E"].sum() == SAVE_AT * pairs
        assert resumed[0][1][f"{gate}.load_E"].sum() == STEPS * pairs
        np.testing.assert_array_equal(saved[0][f"{gate}.start_2"], np.float32([0.75, 1e-3]))
    for name, want in saved[0].items():
        for other in (saved[1], resumed[0][0], resumed[1][0], read):
            np.testing.assert_array_equal(other[name], want, err_msg=name)
    for name, want in resumed[0][1].items():
        np.testing.assert_array_equal(resumed[1][1][name], want, err_msg=name)
