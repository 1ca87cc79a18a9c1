"""Kill jobs over and over, start them again, and compare their ends with those of uninterrupted jobs."""

import itertools
import random
import statistics
import time
from collections import Counter
from pathlib import Path

from data.prepared.manifest import MANIFEST, PROGRESS
from dsv2.monitoring.records import METRICS_FILE, read_metrics
from tests.dist.end_to_end import assert_same_bits, prepare_command, scalars, weights, write_texts
from tests.soak.jobs import Job, start_training

STEPS = 48
# What differs from run to run.
TIMES = ("time", "perf/", "ranks/", "work/", "data/", "step/", "comm/a2a_ms")
PREPARATION = "a preparation"
SAVE = "a save"
SAME = "the same"


class Preparing:
    """`python -m data.prepare`, killed after it has begun to write. About 25 parts lie ahead of it."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.whole = folder / "corpus"
        self._texts = folder / "texts"
        self._rng = rng
        self._texts.mkdir()
        write_texts(self._texts)
        job = self.start(self.whole)
        job.reaches((self.whole / PROGRESS).exists)
        begin = time.monotonic()
        job.reaches((self.whole / MANIFEST).exists)
        self._seconds = time.monotonic() - begin
        job.finish()

    def start(self, out: Path) -> Job:
        return Job(prepare_command(self._texts, out, "--shard-mb", "0.002"), out.parent)

    def comes_to_a_moment(self, job: Job, out: Path) -> bool:
        """Wait for a random moment. False: the job ended before."""
        moment = self._rng.uniform(0, self._seconds / 2)
        return job.reaches((out / PROGRESS).exists) and job.outlives(moment)

    def part_killed(self, out: Path) -> str:
        """Return the part of the job in which the last kill fell."""
        return PREPARATION if (out / PROGRESS).exists() else "its end"

    def check(self, out: Path) -> None:
        """Compare what a finished job left with what an uninterrupted one left."""
        ours, theirs = ({f.name: f.read_bytes() for f in path.iterdir()} for path in (out, self.whole))
        assert ours == theirs, f"{out} differs from {self.whole}"


class Training:
    """`python -m dsv2 train`, killed in a save, at any step, or while it starts."""

    def __init__(self, processes: int, corpus: Path, folder: Path, rng: random.Random) -> None:
        self._processes = processes
        self._corpus = corpus
        self._rng = rng
        self._moments = itertools.cycle(["save", "step", "start"])
        self._whole = folder / "whole"
        begin = time.monotonic()
        job = self.start(self._whole)
        job.reaches(lambda: self._has_stepped(self._whole))
        self._start_s = time.monotonic() - begin
        job.finish()
        self._train_s = time.monotonic() - begin - self._start_s
        self._save_s = statistics.median(scalars(self._whole, "perf/save_s").values())

    def start(self, out: Path) -> Job:
        self._size = _size(out / METRICS_FILE)
        self._torn = _partial_saves(out)
        return start_training(self._processes, self._corpus, out, f"optim.total_tokens={STEPS * 256}")

    def comes_to_a_moment(self, job: Job, out: Path) -> bool:
        """Wait for a save, a step or a start, then for a random time. False: the job ended before."""
        share = self._rng.random()
        match next(self._moments):
            case "save":
                count = self._rng.randint(1, 3)
                seen: set[str] = set()

                def has_begun_to_save() -> bool:
                    seen.update(name for name, _ in _partial_saves(out) - self._torn)
                    return len(seen) == count

                return job.reaches(has_begun_to_save) and job.outlives(share * self._save_s / 2)
            case "step":
                return job.reaches(lambda: self._has_stepped(out)) and job.outlives(share * self._train_s)
            case _:
                return job.outlives(share * self._start_s)

    def part_killed(self, out: Path) -> str:
        """Return the part of the job in which the last kill fell."""
        if _partial_saves(out) - self._torn:
            return SAVE
        return "other steps" if self._has_stepped(out) else "a start"

    def check(self, out: Path) -> None:
        """Compare what a finished job left with what an uninterrupted one left."""
        ours = _exact_rows(out)
        assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
        for row, expected in zip(ours, _exact_rows(self._whole), strict=True):
            assert row == expected, f"{out}, step {expected['step']}: {row} instead of {expected}"
        assert_same_bits(weights(out, STEPS), weights(self._whole, STEPS))

    def _has_stepped(self, out: Path) -> bool:
        """Return whether this session has written metrics. A start only cuts a torn line."""
        return _size(out / METRICS_FILE) > self._size


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _partial_saves(run_dir: Path) -> set[tuple[str, int]]:
    """Return the saves that have begun and not ended: their folders' names, and when these last changed."""
    found = set()
    for path in (run_dir / "checkpoints").glob("step-*.partial"):
        try:
            found.add((path.name, path.stat().st_ctime_ns))
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def _exact_rows(run_dir: Path) -> list[dict[str, float]]:
    """Return the metrics that every run of the same layout has to the bit."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_metrics(run_dir)]


def kill_and_continue(task: Preparing | Training, kills: int, out: Path) -> Counter[str]:
    """Kill the job `kills` times and let it end. If it ends before, it is checked, and another one begins.

    Returns:
        kills by the part of the job in which they fell, and how many jobs ended the same.

    Raises:
        AssertionError: a job ended badly, or otherwise than an uninterrupted one.
    """
    counts: Counter[str] = Counter()
    left = kills
    while left or not counts[SAME]:
        name = out.with_name(f"{out.name}-{counts[SAME]}")
        job = task.start(name)
        try:
            while left and task.comes_to_a_moment(job, name):
                job.kill()
                counts[task.part_killed(name)] += 1
                left -= 1
                job = task.start(name)
            job.finish()
        finally:
            job.kill()
        task.check(name)
        counts[SAME] += 1
    return counts
