"""One save at a time, in the background or not; a failed save is told, and ends only the last step."""

import threading

import pytest
import torch

from dsv2.checkpoint.host_copy import HostCopy
from dsv2.checkpoint.state import RunState, Snapshot
from dsv2.errors import CheckpointError, Diverged, PeerLost
from dsv2.optimizers.base import Shard
from dsv2.parallel.mesh import Mesh
from dsv2.training.saver import Saver


class FakeEngine:
    def __init__(self):
        self.mesh = Mesh(torch.device("cpu"))
        self.sharded = self
        self.weight = torch.zeros(3)

    def shard_bytes(self):
        return [self.weight.nbytes]

    def snapshot(self, state):
        shard = Shard("w", 0, 3, {"fp32": self.weight})
        return Snapshot([shard], state, 0.0, torch.get_rng_state())


class FakeStore:
    """Writes when `may_write` is set, and fails at the steps in `failing`."""

    def __init__(self, folder, failing=()):
        self.folder = folder
        self.failing = failing
        self.may_write = threading.Event()
        self.written = {}
        self.writing = 0

    def save(self, snapshot, everyone):
        self.writing += 1
        assert self.writing == 1, "only one save runs at a time"
        self.may_write.wait()
        self.writing -= 1
        if snapshot.state.step in self.failing:
            raise CheckpointError(f"step {snapshot.state.step} failed")
        self.written[snapshot.state.step] = snapshot.shards[0].tensors["fp32"].tolist()


def fill(engine, value):
    engine.weight.fill_(value)


def test_training_goes_on_while_a_save_is_written(tmp_path):
    engine = FakeEngine()
    store = FakeStore(tmp_path)
    with Saver(engine, store, asynchronous=True) as saver:
        fill(engine, 1.0)
        assert saver.save(RunState(step=1), is_last=False) == []
        fill(engine, 2.0)
        assert saver.finished() == []
        store.may_write.set()
        first, second = saver.save(RunState(step=2), is_last=True)
        assert saver.finished() == []
    assert (first.step, second.step) == (1, 2)
    assert store.written == {1: [1.0] * 3, 2: [2.0] * 3}
    assert first.waited_s >= 0
    assert second.waited_s == 0


def test_a_synchronous_save_has_ended_when_save_returns(tmp_path):
    store = FakeStore(tmp_path)
    store.may_write.set()
    with Saver(FakeEngine(), store, asynchronous=False) as saver:
        [saved] = saver.save(RunState(step=1), is_last=False)
    assert store.written.keys() == {1}
    assert saved.stopped_s == saved.seconds


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_told_and_the_last_one_raises(asynchronous, tmp_path):
    store = FakeStore(tmp_path, failing=(1, 2))
    store.may_write.set()
    with Saver(FakeEngine(), store, asynchronous=asynchronous) as saver:
        ended = saver.save(RunState(step=1), is_last=False)
        while not ended:
            ended = saver.finished()
        assert [(save.step, save.problem) for save in ended] == [(1, "step 1 failed")]
        with pytest.raises(CheckpointError, match="step 2 failed"):
            saver.save(RunState(step=2), is_last=True)


def test_the_context_ends_when_the_save_has(tmp_path):
    store = FakeStore(tmp_path)
    release = threading.Timer(0.2, store.may_write.set)
    with Saver(FakeEngine(), store, asynchronous=True) as saver:
        saver.save(RunState(step=1), is_last=False)
        release.start()
    assert store.written.keys() == {1}


def test_a_lost_peer_is_not_waited_for(tmp_path):
    """The save would wait for the same peer."""
    store = FakeStore(tmp_path)
    saver = Saver(FakeEngine(), store, asynchronous=True).__enter__()
    saver.save(RunState(step=1), is_last=False)
    saver.__exit__(PeerLost, PeerLost("gone"), None)
    assert store.written == {}
    store.may_write.set()


def test_a_diverged_run_names_the_last_good_checkpoint(tmp_path):
    saver = Saver(FakeEngine(), FakeStore(tmp_path), asynchronous=True).__enter__()
    with pytest.raises(Diverged, match=r"^step 3: loss nan; there is no checkpoint yet$"):
        saver.__exit__(Diverged, Diverged("step 3: loss nan"), None)


def test_a_host_copy_keeps_values_of_every_type():
    values = [torch.tensor([True, False, True]), torch.arange(5), torch.rand(7), torch.rand(3).bfloat16()]
    shards = [Shard(str(index), 0, len(x), {"buffer": x}) for index, x in enumerate(values)]
    memory = HostCopy([x.nbytes for x in values], torch.device("cpu"))
    for _ in range(2):  # the memory is used again
        copies = memory.of(shards)
        for value, copy in zip(values, copies, strict=True):
            assert torch.equal(copy.tensors["buffer"], value)
            assert copy.tensors["buffer"].dtype == value.dtype
        values[2].neg_()
