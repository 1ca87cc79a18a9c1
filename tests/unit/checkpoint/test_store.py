"""Saving on one rank: a full disk, and which checkpoints remain."""

import shutil
from collections import namedtuple

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from dsv2.checkpoint import tensors
from dsv2.checkpoint.state import RunState, Snapshot
from dsv2.checkpoint.store import FULL, CheckpointStore
from dsv2.errors import CheckpointError
from dsv2.parallel.mesh import ALONE

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.mark.parametrize(
    ("free", "reason"), [(0, "the disk is full (unexpected pos 64)"), (FULL, "unexpected pos 64")]
)
def test_a_failed_write_says_whether_the_disk_is_full(free, reason, tmp_path, monkeypatch):
    def fail(*_):
        raise CheckpointException("write", {0: (RuntimeError("unexpected pos 64\nframe #0"), None)})

    monkeypatch.setattr(tensors, "write", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(FULL * 2, FULL * 2 - free, free))
    store = CheckpointStore(tmp_path, keep=1, settings={})
    with pytest.raises(CheckpointError) as caught:
        store.save(Snapshot([], RunState(step=3), 3, torch.get_rng_state()), ALONE)
    assert str(caught.value).endswith(f"step-00000003 could not be written: {reason}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [(1, 0, [7]), (2, 0, [6, 7]), (2, 3, [3, 6, 7]), (1, 2, [2, 4, 6, 7]), (1, 1, [1, 2, 3, 4, 5, 6, 7])],
)
def test_the_newest_remain_and_every_nth_for_good(keep, keep_every, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "write", lambda shards, folder, group: (folder / ".metadata").touch())
    store = CheckpointStore(tmp_path, keep, {}, keep_every=keep_every)
    for step in range(1, 8):
        store.save(Snapshot([], RunState(step=step), step, torch.get_rng_state()), ALONE)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{step:08d}" for step in kept]
