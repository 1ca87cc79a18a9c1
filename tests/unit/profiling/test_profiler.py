"""Which steps are profiled, what is written, and what happens if it cannot be."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsv2.config.schema import Config, ProfileConfig
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.execution import Execution
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.progress import Part
from dsv2.parallel.watchdog import SLOW_PARTS
from dsv2.profiling.profiler import Profiler
from dsv2.profiling.trace import read
from tests.unit.helpers import tiny_config

STEPS = [3, 4]
RANKS = [0]


class Trainer:
    """What the profiler touches of an engine and a stream, with a model that trains on one batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = tiny_config(num_hidden_layers=2)
        self.mesh = Mesh(torch.device("cpu"))
        self.model = DeepseekV2(config, Execution())
        init_weights(self.model, 0.02, seed=0)
        self.ids = torch.randint(config.vocab_size, (2, 9))
        self.adam = torch.optim.AdamW(self.model.parameters())
        self.deepspeed = SimpleNamespace(step=self.adam.step, allreduce_gradients=lambda: None)

    def take(self) -> torch.Tensor:
        return self.ids.clone()

    def inputs(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ids[:, :-1], ids[:, 1:], torch.arange(2)

    def train(self) -> float:
        loss = self.model(*self.inputs(self.take())).loss
        loss.backward()
        self.deepspeed.step()
        self.adam.zero_grad()
        return loss.item()


class Session:
    """One session of a run that profiles `STEPS`."""

    def __init__(self, runs_dir: Path, ranks: list[int] | None = RANKS, steps: list[int] | None = STEPS):
        self.config = Config(runs_dir=str(runs_dir), profile=ProfileConfig(steps, ranks))
        self.trainer = Trainer()
        self.profiler = Profiler(self.config, self.trainer, self.trainer)

    def take(self, numbers: range) -> tuple[list[float], list[str]]:
        """Take these steps: their losses, and what is to be printed after each of them."""
        losses = []
        lines = []
        for number in numbers:
            with self.profiler.step(number):
                losses.append(self.trainer.train())
            lines += self.profiler.finish()
        return losses, lines

    @property
    def folder(self) -> Path:
        return self.config.run_dir / "profile" / "step-3-4"

    def is_clean(self) -> bool:
        """Whether nothing of the profiler is left on the engine."""
        hooks = [m for m in self.trainer.model.modules() if m._forward_hooks or m._forward_pre_hooks]
        return not hooks and "take" not in vars(self.trainer) and not torch.autograd._profiler_enabled()


def test_the_steps_are_written_with_a_table_and_change_no_number(tmp_path):
    session = Session(tmp_path)
    losses, lines = session.take(range(1, 7))
    assert losses == Session(tmp_path, steps=None).take(range(1, 7))[0]
    assert [path.name for path in session.folder.iterdir()] == ["rank-0.trace.json.gz"]
    breakdown = read(session.folder / "rank-0.trace.json.gz")
    assert breakdown.steps == 2
    assert min(breakdown.parts[part] for part in ("data", "routing", "dispatch", "optimizer")) > 0
    title, kind, *table = lines
    assert title == f"profile: steps 3 to 4, {session.folder}; per step of rank 0:"
    assert kind == "  time of the CPU's operations, with the profiler running"
    assert table == [f"  {line}" for line in breakdown.table().splitlines()]
    assert session.is_clean()


def test_writing_has_the_longer_limit_of_the_watchdog(tmp_path):
    session = Session(tmp_path)
    session.take(range(2, 4))
    assert session.trainer.mesh.progress.position.part is Part.start
    session.take(range(4, 5))
    assert session.trainer.mesh.progress.position.part is Part.profile
    assert Part.profile in SLOW_PARTS


@pytest.mark.parametrize(
    ("session", "numbers", "written"),
    [
        ("before", range(1, 3), False),
        ("ends within", range(1, 4), False),
        ("begins with the first", range(3, 6), True),
        ("begins within", range(4, 7), False),
        ("beyond", range(5, 8), False),
    ],
)
def test_a_session_profiles_all_of_the_steps_or_none(tmp_path, session, numbers, written):
    job = Session(tmp_path)
    with job.profiler:
        _, lines = job.take(numbers)
    assert job.folder.exists() == bool(lines) == written
    assert job.is_clean()


def test_a_repetition_replaces_the_folder(tmp_path):
    session = Session(tmp_path)
    session.folder.mkdir(parents=True)
    (session.folder / "rank-7.trace.json.gz").write_text("of an earlier session with other ranks")
    session.take(range(1, 5))
    assert [path.name for path in session.folder.iterdir()] == ["rank-0.trace.json.gz"]


def test_a_loss_spike_that_sends_the_run_back_begins_the_profile_again(tmp_path):
    session = Session(tmp_path)
    assert session.take(range(1, 4))[1] == []
    assert session.take(range(1, 3))[1] == []  # back to the start
    assert session.take(range(3, 5))[1] != []
    assert read(session.folder / "rank-0.trace.json.gz").steps == 2


def test_an_error_within_a_step_ends_the_profiler(tmp_path):
    session = Session(tmp_path)
    session.trainer.take = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError), session.profiler:
        session.take(range(3, 5))
    del session.trainer.take
    assert session.is_clean()
    assert not session.folder.exists()


@pytest.mark.parametrize(("ranks", "names"), [(None, ["rank-0.trace.json.gz"]), ([1], [])])
def test_only_the_ranks_that_are_named_are_profiled(tmp_path, ranks, names):
    session = Session(tmp_path, ranks)
    _, lines = session.take(range(1, 5))
    assert bool(lines) == bool(names)
    found = session.folder.iterdir() if session.folder.exists() else []
    assert [path.name for path in found] == names


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may have more than 64 KiB. A write beyond that fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_warning_and_leaves_no_half_file(tmp_path, capfd):
    session = Session(tmp_path)
    with capfd.disabled(), full_disk():
        _, lines = session.take(range(1, 7))
    (line,) = lines
    assert line.startswith("warning: profile.steps=[3,4]: rank 0 has written no profile (")
    assert line.endswith("the disk may be full); the run continues")
    assert list(session.folder.iterdir()) == []
    assert session.is_clean()


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path):
    session = Session(tmp_path)
    session.config.run_dir.mkdir()
    (session.config.run_dir / "profile").write_text("")
    (line,) = session.take(range(1, 7))[1]
    assert str(session.folder) in line


def test_a_trace_too_large_to_read_has_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv2.profiling.profiler.LARGEST", 1000)
    session = Session(tmp_path)
    _, lines = session.take(range(1, 5))
    assert lines[1].startswith("  no table: the trace has ")
    assert read(session.folder / "rank-0.trace.json.gz").steps == 2
