"""Train thousands of small steps in one process, and look at its memory, file descriptors and threads."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil

from dsv2.config.compose import compose_config
from dsv2.monitoring.monitor import Monitor
from tests.dist.end_to_end import PYTHON, run, tiny_run
from train import train

EVERY = 5  # steps between two samples
MOST_GROWTH = 4 << 20  # bytes of resident memory from one third to the next: the allocator settles slowly


def main(target: str, *overrides: str) -> None:
    """Train in this process, and write to `target`: resident bytes, descriptors and threads over time."""
    process = psutil.Process()
    samples: list[tuple[int, int, int]] = []
    step = Monitor.step

    def sampled(self: Monitor, *arguments: Any) -> None:
        step(self, *arguments)
        if arguments[0].step % EVERY == 0:
            samples.append((process.memory_info().rss, process.num_fds(), process.num_threads()))

    with patch.object(Monitor, "step", sampled):
        train(compose_config(list(overrides)))
    Path(target).write_text(json.dumps(samples))


def endure(steps: int, corpus: Path, folder: Path) -> str:
    """Train so many steps in another process, and judge its samples.

    Raises:
        AssertionError: the process has grown.
    """
    sizes = ["optim.batch_size=2", f"optim.total_tokens={steps * 64}"]
    distances = ["checkpoint.every=50", "eval.every=100"]
    target = folder / "samples.json"
    overrides = tiny_run(corpus, folder, "endurance", *sizes, *distances)
    run([PYTHON, "-m", "tests.soak.endurance", str(target), *overrides])
    return f"{steps} steps: {judge(json.loads(target.read_text()))}"


def judge(samples: list[list[int]]) -> str:
    """Compare the medians of the second and the last third of the samples. The first third warms up."""
    thirds = [np.median(third, axis=0) for third in np.array_split(samples, 3)]
    memory, files, threads = thirds[1]
    more_memory, more_files, more_threads = thirds[2]
    seen = (
        f"{memory / 2**20:.1f} then {more_memory / 2**20:.1f} MiB, {files:.0f} then {more_files:.0f} "
        f"descriptors, {threads:.0f} then {more_threads:.0f} threads"
    )
    assert more_memory - memory < MOST_GROWTH, seen
    assert more_files <= files, seen
    assert more_threads <= threads, seen
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:])
