"""Checkpoints whose bytes are not what was written, and a disk that is full for one rank."""

import resource
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from tests.dist import jobs, traces

LAYOUTS = {1: {"ep": 1, "stage": 1, "micro_batch": 4}, 2: {"ep": 2, "stage": 1, "micro_batch": 2}}
FILES = ["__0_0.distcp", ".metadata", "rng.pt"]
OLDER, NEWER = "step-00000001", "step-00000002"


def _store(folder: str) -> Any:
    from dsv2.checkpoint.store import CheckpointStore

    return CheckpointStore(Path(folder), 2, jobs.SETTINGS)


def save_twice(rank: int, world_size: int, folder: str, **layout: Any) -> None:
    """Run on every rank: a checkpoint after step 1 and another after step 2."""
    from dsv2.checkpoint.state import RunState

    engine = jobs.make_engine(rank, world_size, **layout)
    for step in (1, 2):
        jobs.steps_of(engine, step - 1, 1, layout["micro_batch"])
        jobs.save(engine, _store(folder), RunState(step=step, tokens=10 * step))


def go_on(rank: int, world_size: int, folder: str, resume: str, **layout: Any) -> Any:
    """Run on every rank: find, load, train a step, save at step 3: (step found, warnings, weights loaded).

    A refusal is returned as its text.
    """
    from dsv2.checkpoint.state import RunState
    from dsv2.errors import UserError

    engine = jobs.make_engine(rank, world_size, **layout)
    try:
        found = _store(folder).find(resume)
        done = engine.load(_store(folder), found)
    except UserError as error:
        return str(error)
    weights = jobs.owned(engine, "fp32")
    jobs.steps_of(engine, done.state.step, 1, layout["micro_batch"])
    jobs.save(engine, _store(folder), RunState(step=3, tokens=done.state.tokens + 10))
    return done.state.step, done.warnings, weights


def flip(file: Path) -> None:
    """Change a byte in the middle; the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


@pytest.fixture(scope="module", params=[1, 2])
def saved(request: pytest.FixtureRequest, pools: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(world size, folder with two checkpoints)"""
    world_size, folder = request.param, tmp_path_factory.mktemp("saved")
    pools[world_size].run("tests.dist.test_damage:save_twice", folder=str(folder), **LAYOUTS[world_size])
    return world_size, folder


@pytest.fixture
def run(saved: Any, pools: Any, tmp_path: Path) -> Any:
    """Go on from a copy of the two checkpoints: all ranks' answers. `damage`: a file of the newer one."""
    world_size, source = saved
    folder = Path(copytree(source, tmp_path / "checkpoints"))

    def start(damage: str | None, resume: str = "auto") -> list[Any]:
        if damage:
            flip(folder / NEWER / damage)
        job = "tests.dist.test_damage:go_on"
        return pools[world_size].run(job, folder=str(folder), resume=resume, **LAYOUTS[world_size])

    start.folder = folder  # type: ignore[attr-defined]
    return start


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_damaged(run):
    for step, warnings, _ in run(None):
        assert (step, warnings) == (2, [])
    assert names(run.folder) == [NEWER, "step-00000003"]


@pytest.mark.parametrize("file", FILES)
def test_auto_falls_back_to_the_older_one(run, saved, pools, file, tmp_path):
    answers = run(file)
    problem = f"checkpoint {run.folder / NEWER}: {file} does not hold what was written (its checksum differs)"
    for step, warnings, _ in answers:
        assert step == 1
        assert warnings == [f"{problem}; use an older one; set aside as {NEWER}.damaged"]
    # keep=2 does not count what was set aside, nor does a later save remove it.
    assert names(run.folder) == [OLDER, f"{NEWER}.damaged", "step-00000003"]
    alone = Path(copytree(saved[1], tmp_path / "alone")) / OLDER
    layout = LAYOUTS[saved[0]]
    wanted = pools[saved[0]].run(
        "tests.dist.test_damage:go_on", folder=str(tmp_path / "other"), resume=str(alone), **layout
    )
    got, want = (traces.whole([loaded for _, _, loaded in ranks]) for ranks in (answers, wanted))
    assert got.keys() == want.keys()
    assert all((got[name] == want[name]).all() for name in want), "the weights are the older one's"


@pytest.mark.parametrize("file", FILES)
def test_by_its_path_it_is_refused_and_stays(run, file, tmp_path):
    elsewhere = tmp_path / "elsewhere"  # as another run's: this run has no checkpoint to go on from
    run.folder.rename(elsewhere)
    flip(elsewhere / NEWER / file)
    run.folder.mkdir()
    for answer in run(None, resume=str(elsewhere / NEWER)):
        assert answer == (
            f"checkpoint {elsewhere / NEWER}: {file} does not hold what was written (its checksum differs); "
            "use an older one"
        )
    assert names(elsewhere) == [OLDER, NEWER]


@pytest.mark.parametrize("file", FILES)
def test_own_newest_by_its_path_is_refused_and_stays(run, file):
    for answer in run(file, resume=str(run.folder / NEWER)):
        assert f"{file} does not hold what was written" in answer
        assert "\n" not in answer
    assert names(run.folder) == [OLDER, NEWER]


@pytest.mark.parametrize("file", FILES)
def test_without_an_older_one_it_is_refused(run, file):
    for path in (run.folder / OLDER).iterdir():
        path.unlink()
    (run.folder / OLDER).rmdir()
    for answer in run(file):
        assert f"{file} does not hold what was written" in answer
        assert "\n" not in answer
    assert names(run.folder) == [NEWER]


def full_for_one(rank: int, world_size: int, folder: str, **layout: Any) -> list[tuple[str, list[str]]]:
    """Run on every rank: the last one cannot write 20 kB at step 2, and can again at step 3.

    Returns the refusals, and what the folder held right after.
    """
    import torch.distributed as dist

    from dsv2.checkpoint.state import RunState
    from dsv2.errors import CheckpointError

    engine = jobs.make_engine(rank, world_size, **layout)
    refusals = []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (1, 2, 3):
        jobs.steps_of(engine, step - 1, 1, layout["micro_batch"])
        if step == 2 and rank == world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
        try:
            jobs.save(engine, _store(folder), RunState(step=step, tokens=10 * step))
        except CheckpointError as error:
            dist.barrier()
            refusals.append((str(error), names(Path(folder))))
            dist.barrier()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return refusals


def test_a_disk_that_is_full_for_one_rank(pools, tmp_path):
    answers = pools[2].run("tests.dist.test_damage:full_for_one", folder=str(tmp_path), **LAYOUTS[2])
    assert answers[0] == answers[1], "every rank knows"
    [(refusal, left)] = answers[0]
    assert refusal.startswith(f"checkpoint {tmp_path / NEWER} could not be written: ")
    assert "File too large" in refusal
    assert left == [OLDER], "nothing is left of the attempt"
    assert names(tmp_path) == [OLDER, "step-00000003"]
