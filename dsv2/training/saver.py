"""Save a run's checkpoints while training continues.

Training stops only while a rank copies its shards into host memory. A thread then writes the copy, through
a separate process group (`Mesh.background`). Only one save runs at a time: the next one waits for it, so
a slow disk never builds a queue.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from types import TracebackType
from typing import TypeVar

import torch

from dsv2.checkpoint.files import last_good
from dsv2.checkpoint.host_copy import HostCopy
from dsv2.checkpoint.state import Loaded, RunState, Saved, Snapshot
from dsv2.checkpoint.store import CheckpointStore
from dsv2.errors import CheckpointError, Diverged, PeerLost
from dsv2.parallel.hang import CHECKPOINT_THREAD
from dsv2.parallel.mesh import MeshDim
from dsv2.parallel.plan import Dim
from dsv2.parallel.progress import Part
from dsv2.training.engine import Engine

T = TypeVar("T")


class Saver:
    """Saves checkpoints. As a context it ends when no save is running.

    Args:
        asynchronous: False: `save` returns when the checkpoint is complete.
    """

    def __init__(self, engine: Engine, store: CheckpointStore, *, asynchronous: bool):
        self._engine = engine
        self._store = store
        self._device = engine.mesh.device
        self._asynchronous = asynchronous
        self._running: Future[Saved] | None = None

    def __enter__(self) -> "Saver":
        if self._asynchronous:
            # Pinning gigabytes takes seconds, so it begins before the first save.
            sizes = self._engine.sharded.shard_bytes()
            self._copy = _in_background(lambda: HostCopy(sizes, self._device), self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for a running save. Name the last good checkpoint if the run diverged."""
        if self._running is not None and not isinstance(error, PeerLost):
            with suppress(CheckpointError, PeerLost):
                self._running.result()
        if isinstance(error, Diverged):
            raise Diverged(f"{error}; {last_good(self._store.folder)}") from None

    def save(self, state: RunState, *, is_last: bool) -> list[Saved]:
        """Begin to save, after an earlier save has ended. Return the saves that have ended. Collective.

        Args:
            is_last: wait for this save too.

        Raises:
            CheckpointError: on every rank, if the last save failed.
            Diverged: on every rank, if a weight or a state is not a finite number on any rank.
        """
        self._engine.mesh.progress.enter(Part.save)
        due = time.perf_counter()
        ended = self._ended()
        begin = time.perf_counter()
        ended = [saved._replace(waited_s=begin - due) for saved in ended]
        snapshot = self._engine.snapshot(state)
        if not self._asynchronous:
            ended.append(self._write(snapshot, self._engine.mesh[Dim.world], begin))
        else:
            snapshot = snapshot._replace(shards=self._copy.result().of(snapshot.shards))
            stopped_s = time.perf_counter() - begin
            background = self._engine.mesh.background
            self._running = _in_background(
                lambda: self._write(snapshot, background, begin, stopped_s), self._device
            )
            if is_last:
                ended += self._ended()
        if is_last and ended[-1].problem is not None:
            raise CheckpointError(ended[-1].problem)
        return ended

    def wait(self) -> list[Saved]:
        """Return how the running save went, after it has ended."""
        self._engine.mesh.progress.enter(Part.save)
        return self._ended()

    def load_newest(self) -> Loaded | None:
        """Load this run's newest checkpoint; None if it has none. No save may be running. Collective."""
        found = self._store.find("auto")
        return self._engine.load(self._store, found) if found else None

    def finished(self) -> list[Saved]:
        """Return the save that has ended since the last call, if there is one. It never waits."""
        return self._ended() if self._running is not None and self._running.done() else []

    def _ended(self) -> list[Saved]:
        """Wait for the running save, if there is one, and return how it went."""
        running = self._running
        self._running = None
        return [] if running is None else [running.result()]

    def _write(
        self, snapshot: Snapshot, everyone: MeshDim, begin: float, stopped_s: float | None = None
    ) -> Saved:
        problem = None
        try:
            self._store.save(snapshot, everyone)
        except CheckpointError as error:  # older checkpoints are untouched
            problem = str(error)
        seconds = time.perf_counter() - begin
        return Saved(snapshot.state.step, seconds if stopped_s is None else stopped_s, seconds, problem)


def _in_background(work: Callable[[], T], device: torch.device) -> "Future[T]":
    """Run `work` in a thread. The thread does not keep a process alive that has lost its peers."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a new thread begins with the machine's first GPU
            future.set_result(work())
        except BaseException as error:  # of any kind: whoever waits for the result gets it
            future.set_exception(error)

    Thread(target=run, name=CHECKPOINT_THREAD, daemon=True).start()
    return future
