"""A save that goes on while training changes the weights holds the weights of its own step, to the bit."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv2.checkpoint.safe_reader import SafeReader
from dsv2.config.schema import Precision
from tests.dist import jobs

KEYS = ("fp32", "exp_avg", "exp_avg_sq")
LAYOUTS = {
    "one rank": (1, {"ep": 1, "stage": 0, "micro_batch": 4}, torch.float32),
    "ZeRO-3": (2, {"ep": 2, "stage": 3, "micro_batch": 2}, torch.float32),
    "bf16 states": (
        2,
        {"ep": 2, "stage": 1, "micro_batch": 2, "bf16": True, "states": Precision.bf16},
        torch.bfloat16,
    ),
}


def all_owned(engine: Any) -> list[Any]:
    return [jobs.owned(engine, key) for key in KEYS]


def save_while_training(rank: int, world_size: int, folder: str, **layout: Any) -> Any:
    """Run on every rank: save after step 1, train two steps before anything is written, then load.

    Returns the shards at step 1, at step 3 and as loaded, and what `Saver` told.
    """
    from dsv2.checkpoint.state import RunState
    from dsv2.checkpoint.store import CheckpointStore
    from dsv2.training.saver import Saver

    may_write = threading.Event()

    class SlowStore(CheckpointStore):
        def save(self, *arguments: Any) -> Path:
            may_write.wait()
            return super().save(*arguments)

    engine = jobs.make_engine(rank, world_size, **layout)
    store = SlowStore(Path(folder), 2, jobs.SETTINGS)
    with Saver(engine, store, asynchronous=True) as saver:
        jobs.steps_of(engine, 0, 1, layout["micro_batch"])
        at_save = all_owned(engine)
        told = [saver.finished(), saver.save(RunState(step=1, tokens=10), is_last=False), saver.finished()]
        jobs.steps_of(engine, 1, 2, layout["micro_batch"])
        told.append(saver.finished())
        may_write.set()
        told.append(saver.save(RunState(step=3, tokens=30), is_last=True))
    at_end = all_owned(engine)
    store.load(found(store, 1), engine.sharded.shards(), engine.mesh)
    return at_save, at_end, all_owned(engine), told


def found(store: Any, step: int) -> Any:
    from dsv2.checkpoint.state import Found, RunState

    return Found(store.folder / f"step-{step:08d}", RunState(), [], [], {})


def assert_equal(left: list[Any], right: list[Any]) -> None:
    for key, ours, theirs in zip(KEYS, left, right, strict=True):
        assert ours, key
        for (name, *_, value), (other, *_, expected) in zip(ours, theirs, strict=True):
            assert name == other
            np.testing.assert_array_equal(value, expected, err_msg=f"{key} {name}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_save_holds_its_own_step(layout, pools, tmp_path):
    world_size, arguments, dtype = LAYOUTS[layout]
    job = "tests.dist.test_saver:save_while_training"
    for at_save, at_end, loaded, told in pools[world_size].run(job, folder=str(tmp_path), **arguments):
        assert_equal(loaded, at_save)
        with pytest.raises(AssertionError):
            assert_equal(at_end, at_save)  # training went on
        *before, last = told
        assert before == [[], [], [], []], "nothing was written while training went on"
        assert [(save.step, save.problem) for save in last] == [(1, None), (3, None)]
        assert 0 < last[0].stopped_s < last[0].seconds
        assert last[0].waited_s > 0
    index = SafeReader(tmp_path / "step-00000001").read_metadata().state_dict_metadata
    assert {saved.properties.dtype for saved in index.values()} == {dtype}


def load_elsewhere(rank: int, world_size: int, folder: str, **layout: Any) -> Any:
    """Run on every rank: load the checkpoint of step 3 into an engine of this layout."""
    from dsv2.checkpoint.store import CheckpointStore

    engine = jobs.make_engine(rank, world_size, **layout)
    jobs.steps_of(engine, 100, 1, layout["micro_batch"])  # so that a tensor the load forgets shows
    store = CheckpointStore(Path(folder), 2, jobs.SETTINGS)
    store.load(found(store, 3), engine.sharded.shards(), engine.mesh)
    return all_owned(engine)


def rounded(parts: list[Any]) -> list[Any]:
    """Round the values to bf16."""
    return [
        [(*rest, torch.from_numpy(value).bfloat16().float().numpy()) for *rest, value in part]
        for part in parts
    ]


def test_states_load_into_another_precision(pools, tmp_path):
    fp32 = {"ep": 2, "stage": 1, "micro_batch": 2, "bf16": True}
    bf16 = {**fp32, "states": Precision.bf16}
    save = "tests.dist.test_saver:save_while_training"
    load = "tests.dist.test_saver:load_elsewhere"
    for name, here, there in [("narrow", fp32, bf16), ("wide", bf16, fp32)]:
        folder = str(tmp_path / name)
        saved = pools[2].run(save, folder=folder, **here)
        for (_, at_end, *_), loaded in zip(saved, pools[2].run(load, folder=folder, **there), strict=True):
            assert_equal(loaded, rounded(at_end) if there is bf16 else at_end)
