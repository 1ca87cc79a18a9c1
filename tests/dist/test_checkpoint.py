"""A checkpoint of one layout continues on another as if nothing had happened."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv2.checkpoint.reader import CheckpointReader
from dsv2.config.schema import Precision
from dsv2.inference.model import load_model
from tests.dist import jobs, traces

SAVE_AT, STEPS = 2, 5
# Losses after the save, whole weights, and each rank's random state at the save.
Outcome = tuple[list[float], dict[str, np.ndarray], list[np.ndarray]]


def _save(pools: Any, folder: Path, world_size: int, save_at: int = SAVE_AT, **layout: Any) -> Outcome:
    results = pools[world_size].run(
        "tests.dist.jobs:train_and_save", folder=str(folder), save_at=save_at, steps=STEPS, **layout
    )
    losses = results[0][0].losses[save_at:]
    return losses, traces.whole([parts for _, parts, _ in results]), [rng for _, _, rng in results]


def _load(pools: Any, folder: Path, world_size: int, **layout: Any) -> Outcome:
    path = folder / f"step-{SAVE_AT:08d}"
    results = pools[world_size].run("tests.dist.jobs:load_and_train", path=str(path), steps=STEPS, **layout)
    state = results[0][0]
    assert (state.step, state.tokens) == (SAVE_AT, SAVE_AT * jobs.BATCH * jobs.SEQUENCE)
    assert (state.data, state.wandb_id) == ({"consumed": 1}, "w")
    parts, random_states = [result[2] for result in results], [result[3] for result in results]
    return results[0][1].losses, traces.whole(parts), random_states


BF16 = {"bf16": True, "states": Precision.bf16}


def _layout(world_size: int, ep: int, stage: int, bf16: bool = False, **more: Any) -> dict[str, Any]:
    layout = {"world_size": world_size, "ep": ep, "stage": stage, "micro_batch": 4 // world_size}
    return layout | ({"bf16": True} if bf16 else {}) | more


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"),
    [
        ((2, 2, 1), (1, 1, 1)),
        ((2, 2, 1), (4, 4, 3)),
        ((2, 1, 2), (4, 2, 1)),
        ((4, 4, 3), (2, 2, 2)),
        ((4, 2, 3), (4, 1, 3)),
        ((2, 2, 0), (4, 4, 2)),
        *(
            pytest.param(*pair, marks=pytest.mark.full)
            for pair in [((4, 2, 2), (2, 1, 0)), ((1, 1, 3), (2, 2, 3)), ((1, 1, 2), (4, 2, 0))]
        ),
    ],
)
def test_continues_on_another_layout(pools, tmp_path, saved_on, loaded_on):
    losses, weights, _ = _save(pools, tmp_path, **_layout(*saved_on))
    resumed_losses, resumed_weights, _ = _load(pools, tmp_path, **_layout(*loaded_on))
    np.testing.assert_allclose(resumed_losses, losses, rtol=1e-6)
    assert resumed_weights.keys() == weights.keys()
    for name, want in weights.items():
        assert np.linalg.norm(resumed_weights[name] - want) / np.linalg.norm(want) < 2e-5, name


@pytest.mark.parametrize(
    ("world_size", "ep", "stage", "bf16"),
    [
        (1, 1, 1, False),
        (2, 2, 0, False),
        (2, 2, 1, False),
        (2, 1, 2, False),
        (2, 2, 3, False),
        (2, 2, 1, True),
        (2, 2, 2, True),
        (2, 2, 3, True),
    ],
)
def test_same_layout_is_exact_to_the_bit(pools, tmp_path, world_size, ep, stage, bf16):
    layout = _layout(world_size, ep, stage, bf16)
    losses, weights, random_states = _save(pools, tmp_path, **layout)
    resumed_losses, resumed_weights, resumed_random_states = _load(pools, tmp_path, **layout)
    assert resumed_losses == losses
    assert len({state.tobytes() for state in random_states}) == world_size, "every rank has its own"
    np.testing.assert_array_equal(resumed_random_states, random_states)
    for name, want in weights.items():
        assert np.array_equal(resumed_weights[name], want), name


@pytest.mark.parametrize("saved_on", [(1, 1, 1), (2, 2, 1)])
def test_bf16_states_continue(pools, tmp_path, saved_on):
    """On the same layout to the bit; on others, with other states or in fp32 as near as bf16 lets them."""
    losses, weights, _ = _save(pools, tmp_path, **_layout(*saved_on, **BF16))
    same_losses, same_weights, _ = _load(pools, tmp_path, **_layout(*saved_on, **BF16))
    assert same_losses == losses
    assert all(np.array_equal(same_weights[name], want) for name, want in weights.items())
    for other in (_layout(4, 2, 1, **BF16), _layout(2, 2, 3, bf16=True), _layout(2, 1, 1)):
        resumed_losses, resumed_weights, _ = _load(pools, tmp_path, **other)
        np.testing.assert_allclose(resumed_losses, losses, rtol=5e-3)
        for name, want in weights.items():
            assert traces.relative(resumed_weights[name], want) < 1.5e-2, name


@pytest.mark.parametrize(
    ("world_size", "ep", "stage", "bf16"), [(1, 1, 1, False), (4, 2, 3, False), (2, 2, 2, True)]
)
def test_one_process_reads_the_whole_model(pools, tmp_path, world_size, ep, stage, bf16):
    """Without DeepSpeed or process group: every expert, and the fp32 masters."""
    _, trained, _ = _save(pools, tmp_path, save_at=STEPS, **_layout(world_size, ep, stage, bf16))
    path = tmp_path / f"step-{STEPS:08d}"
    model = load_model(path)
    assert not model.training
    assert model.config == jobs.model_config()
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().flatten().numpy(), trained.pop(name)), name
    assert not trained, "nothing is left out"
    for name, half in load_model(path, torch.bfloat16).named_parameters():
        assert torch.equal(half, model.get_parameter(name).bfloat16()), name
    reader = CheckpointReader(path)
    assert (reader.tensor("lm_head.weight", 61 * 24, "exp_avg_sq") > 0).all()


def test_one_process_reads_bf16_states(pools, tmp_path):
    _, trained, _ = _save(pools, tmp_path, save_at=STEPS, **_layout(2, 2, 1, **BF16))
    for name, parameter in load_model(tmp_path / f"step-{STEPS:08d}").named_parameters():
        assert parameter.dtype == torch.float32
        assert np.array_equal(parameter.detach().flatten().numpy(), trained[name]), name
