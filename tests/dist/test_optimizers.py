"""An optimizer with other states than AdamW's trains, and its checkpoints follow its state names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from dsv2.config.schema import OptimConfig
from dsv2.optimizers.base import Optimizer, Shard
from tests.dist import jobs, traces

SAVE_AT = 2
STEPS = 4


class Momentum(Optimizer):
    """SGD with momentum."""

    name = "momentum"
    counts_steps = False

    def check(self, optim: OptimConfig) -> None:
        pass

    def state_names(self, group: str) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def update_copies(self, *, bf16_states: bool, fp32_gradient: bool) -> int:
        return 2

    def build(self, groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.beta1)

    def update(
        self,
        shard: Shard,
        gradient: Tensor,
        *,
        weight: Tensor | None,
        scale: Tensor,
        settings: dict[str, Any],
        step: int,
        kernels: Any,
    ) -> None:
        weights = shard.tensors["fp32"]
        momentum = shard.tensors["momentum_buffer"]
        momentum.mul_(settings["momentum"]).add_(gradient * scale + settings["weight_decay"] * weights)
        weights.sub_(settings["lr"] * momentum)
        if weight is not None:
            weight.copy_(weights)


@contextmanager
def momentum() -> Iterator[None]:
    optim = replace(jobs.OPTIM, name="momentum")
    with patch("dsv2.optimizers.rules.OPTIMIZERS", (Momentum,)), patch.object(jobs, "OPTIM", optim):
        yield


def train_and_save(rank: int, world_size: int, **options: Any) -> tuple:
    with momentum():
        return jobs.train_and_save(rank, world_size, save_at=SAVE_AT, steps=STEPS, **options)


def load_and_train(rank: int, world_size: int, **options: Any) -> tuple:
    with momentum():
        return jobs.load_and_train(rank, world_size, steps=STEPS, **options)


def run(pools: Any, job: str, **options: Any) -> tuple[list[float], dict[str, np.ndarray]]:
    results = pools[2].run(f"tests.dist.test_optimizers:{job}", **options)
    trace = results[0][0] if job == "train_and_save" else results[0][1]
    parts = [result[1] if job == "train_and_save" else result[2] for result in results]
    return trace.losses, traces.whole(parts)


FP32 = {"ep": 2, "stage": 1, "micro_batch": 2}
BF16 = {"ep": 2, "stage": 1, "micro_batch": 2, "bf16": True}


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"), [(FP32, {"ep": 1, "stage": 3, "micro_batch": 2}), (BF16, BF16)]
)
def test_trains_and_resumes(pools, tmp_path, saved_on, loaded_on):
    losses, weights = run(pools, "train_and_save", folder=str(tmp_path), **saved_on)
    path = tmp_path / f"step-{SAVE_AT:08d}"
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    assert {name.split("/")[0] for name in saved} == {"fp32", "momentum_buffer"}
    assert len(saved) == 2 * len(weights)
    resumed_losses, resumed = run(pools, "load_and_train", path=str(path), **loaded_on)
    np.testing.assert_allclose(resumed_losses, losses[SAVE_AT:], rtol=0 if loaded_on is saved_on else 1e-6)
    for name, want in weights.items():
        assert traces.relative(resumed[name], want) < (1e-12 if loaded_on is saved_on else 2e-5), name


def test_bf16_follows_fp32(pools, tmp_path: Path):
    want, _ = run(pools, "train_and_save", folder=str(tmp_path / "fp32"), **FP32)
    got, _ = run(pools, "train_and_save", folder=str(tmp_path / "bf16"), **BF16)
    np.testing.assert_allclose(got, want, rtol=5e-3)
