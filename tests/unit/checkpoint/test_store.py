"""Saving on one rank."""

import shutil
from collections import namedtuple

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from dsv2.checkpoint import tensors
from dsv2.checkpoint.state import RunState
from dsv2.checkpoint.store import FULL, CheckpointStore
from dsv2.errors import CheckpointError
from dsv2.parallel.mesh import Mesh

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
        store.save([], RunState(step=3), optimizer_steps=3, mesh=Mesh(torch.device("cpu")))
    assert str(caught.value).endswith(f"step-00000003 could not be written: {reason}")
    assert not list(tmp_path.iterdir())
