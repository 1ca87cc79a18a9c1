import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dist import traces
from tests.dist.end_to_end import (
    OFFLINE,
    PYTHON,
    ROOT,
    kill_hard,
    prepare_command,
    run,
    tiny_run,
    write_texts,
)
from tests.dist.pool import Pool


class Pools:
    """pools[world_size].run("module:function", **arguments) runs the function on so many ranks."""

    def __getitem__(self, world_size: int) -> Pool:
        return Pool(world_size)


@pytest.fixture(scope="session")
def pools() -> Pools:
    return Pools()


@pytest.fixture(scope="session")
def train(pools: Pools) -> Callable[..., traces.Trace]:
    """What tests.dist.jobs:train did: train(world_size, steps, ep=..., stage=..., micro_batch=..., ...)."""

    def trace(world_size: int, steps: int, **layout: Any) -> traces.Trace:
        return traces.assemble(pools[world_size].run("tests.dist.jobs:train", steps=steps, **layout))

    return trace


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of small made-up sources."""
    folder, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("prepared")
    write_texts(folder)
    subprocess.run(prepare_command(folder, out), cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def run_command(corpus: Path) -> Callable[..., list[str]]:
    """The command line of a tiny run: run_command(runs_dir, name, *overrides, launcher=TORCHRUN)."""

    def build(runs_dir: Path, name: str, *overrides: str, launcher: list[str] | None = None) -> list[str]:
        return [*(launcher or [PYTHON]), "train.py", *tiny_run(corpus, runs_dir, name, *overrides)]

    return build


@pytest.fixture
def command(run_command: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """The same, with its runs in tmp_path."""
    return functools.partial(run_command, tmp_path)


@pytest.fixture(scope="session")
def begun(run_command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that stopped after step 12, with checkpoints of 8 and 12; copy it to change it."""
    folder = tmp_path_factory.mktemp("begun")
    run(run_command(folder, "run", "stop_step=12", OFFLINE))
    return folder / "run"


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a job, which is gone after the test; its output goes to a file if one is given."""
    jobs: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], output: Path = Path(os.devnull)) -> subprocess.Popen[bytes]:
        with output.open("wb") as file:
            errors = None if output == Path(os.devnull) else subprocess.STDOUT
            jobs.append(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=errors))
        return jobs[-1]

    yield start
    for job in jobs:
        kill_hard(job)
