"""`python -m dsv2 train`: the processes it starts and what it appends. test_ranks.py has how they end.

Programs are recording stand-ins, so the machine's own GPUs do not matter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from dsv2.cli import train
from dsv2.cli.machines import Machines
from dsv2.errors import UserError
from tests.unit.helpers import REPO, run_verb
from tests.unit.sandbox import Sandbox

QUICKSTART = "experiment=quickstart"


class Started(NamedTuple):
    command: list[str]
    processes: int
    machines: Machines
    variables: dict[str, str]
    patience: float
    checked: tuple[int, list[str]] | None


@pytest.fixture
def start(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Started]:
    """Run the verb in the repository with these variables; return what it started."""
    checked: list[tuple[int, list[str]]] = []
    started: list[tuple[Any, ...]] = []

    def run_ranks(*arguments: Any) -> int:
        started.append(arguments)
        return 7

    monkeypatch.setattr(train, "run_ranks", run_ranks)
    monkeypatch.setattr(train, "check", lambda *words: checked.append(words))
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(train.sys, "executable", "python")
    monkeypatch.chdir(REPO)
    for name in [*train.settings(1, {}), "NPROC", "CUDA_VISIBLE_DEVICES", "GPUS", "NNODES"]:
        monkeypatch.delenv(name, raising=False)

    def run(*words: str, **variables: str) -> Started:
        for name, value in box.env(**variables).items():
            monkeypatch.setenv(name, value)
        assert run_verb("train", *words) == 7, "the job's exit code"
        return Started(*started.pop(), checked.pop() if checked else None)

    return run


def arguments(started: Started) -> list[str]:
    assert started.command[:2] == ["python", "train.py"]
    return started.command[2:]


def test_without_gpus_two_processes_start(start, capsys):
    started = start(QUICKSTART, "name=a b")
    assert started.processes == 2
    assert arguments(started) == [QUICKSTART, "name=a b"]
    assert capsys.readouterr().out == (
        "+ OMP_NUM_THREADS=4 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 MALLOC_MMAP_THRESHOLD_=33554432"
        f" MALLOC_TRIM_THRESHOLD_=268435456 python train.py {QUICKSTART} 'name=a b' (2 processes)\n"
    )
    assert started.variables["OMP_NUM_THREADS"] == "4"
    assert started.machines == Machines(1)
    assert started.patience == 120
    assert started.checked == (2, [QUICKSTART, "name=a b"])


@pytest.mark.parametrize(
    ("variables", "overrides", "processes", "threads"),
    [
        ({"GPUS": "4"}, [], 4, "2"),
        ({"GPUS": "4", "CUDA_VISIBLE_DEVICES": "1,3"}, [], 2, "4"),
        ({"GPUS": "4", "CUDA_VISIBLE_DEVICES": "GPU-8a,GPU-9b,GPU-c"}, [], 3, "2"),
        ({"GPUS": "4", "CUDA_VISIBLE_DEVICES": ""}, [], 2, "4"),
        ({"GPUS": "4", "CUDA_VISIBLE_DEVICES": "-1"}, [], 2, "4"),
        ({"GPUS": "4"}, ["runtime.device=cpu"], 2, "4"),
        ({"GPUS": "4", "NPROC": "3"}, [], 3, "2"),
        ({"NPROC": "16"}, [], 16, "1"),
        ({"OMP_NUM_THREADS": "5"}, [], 2, "5"),
    ],
)
def test_processes_and_threads(start, variables, overrides, processes, threads):
    started = start(*overrides, **variables)
    assert (started.processes, arguments(started)) == (processes, overrides)
    assert started.variables["OMP_NUM_THREADS"] == threads
    assert started.checked == (processes, overrides)


@pytest.mark.parametrize(
    ("gpus", "processes"),
    [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 4), (8, 8), (9, 8), (16, 8)],
)
def test_the_quickstart_starts_as_many_processes_as_fit_its_batch(start, capsys, gpus, processes):
    started = start(QUICKSTART, GPUS=str(gpus))
    assert started.processes == processes
    printed = capsys.readouterr().out
    assert (f"quickstart: {processes} processes on {gpus} GPUs" in printed) == (processes < gpus)
    appended = [f"runtime.micro_batch_size={8 // processes}"] if processes > 2 else []
    assert [word for word in arguments(started) if "micro_batch_size" in word] == appended


@pytest.mark.parametrize(
    ("overrides", "variables", "processes"),
    [([QUICKSTART], {"NPROC": "6"}, 6), (["experiment=other"], {}, 7), ([f"name={QUICKSTART}"], {}, 7)],
)
def test_a_given_number_or_another_experiment_gets_all_processes(start, overrides, variables, processes):
    assert start(*overrides, GPUS="7", **variables).processes == processes


@pytest.mark.parametrize("variables", [{"NPROC": "1"}, {"GPUS": "1"}])
def test_one_process_turns_expert_parallelism_off_and_says_so(start, capsys, variables):
    started = start(QUICKSTART, **variables)
    assert started.processes == 1
    assert arguments(started) == [QUICKSTART, "parallel.expert_parallel_size=1"]
    assert started.checked == (1, [QUICKSTART, "parallel.expert_parallel_size=1"])
    assert capsys.readouterr().out.startswith("one process: appending parallel.expert_parallel_size=1")


@pytest.mark.parametrize("given", ["parallel.expert_parallel_size=2", "++parallel.expert_parallel_size=1"])
def test_one_process_leaves_a_given_size_alone(start, capsys, given):
    started = start(given, "name=x", NPROC="1")
    assert arguments(started) == [given, "name=x"]
    assert "appending" not in capsys.readouterr().out


@pytest.mark.parametrize("nproc", ["0", "two", "-1"])
def test_a_wrong_nproc_is_refused(monkeypatch, capsys, nproc):
    monkeypatch.setenv("NPROC", nproc)
    monkeypatch.setattr(train, "run_ranks", lambda *words: pytest.fail("something started"))
    assert run_verb("train") == 2
    assert capsys.readouterr() == ("", f"error: NPROC={nproc}: must be a whole number, at least 1\n")


@pytest.mark.parametrize("seconds", ["0", "soon", "-1"])
def test_a_wrong_time_to_save_is_refused(seconds):
    with pytest.raises(UserError, match=f"^TORCH_ELASTIC_SHUTDOWN_TIMEOUT={seconds}: must be a whole number"):
        train.patience_s({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": seconds})


def test_one_of_several_machines(start, capsys):
    started = start(QUICKSTART, NNODES="3", HEAD="node0:29500", NPROC="1")
    assert started.machines == Machines(3, "node0", 29500, None, "dsv2")
    assert (started.processes, arguments(started)) == (1, [QUICKSTART])
    assert started.checked is None, "this machine does not know how many processes the others start"
    assert "expert_parallel_size" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--cfg", "job", "model=lite"], ["-c", "job"], ["model=lite", "--cfg", "job"], ["--cfg=job"]]
)
def test_a_question_to_hydra_goes_to_train_py(box, monkeypatch, words):
    monkeypatch.setattr(train.sys, "executable", str(box.bin / "python"))
    monkeypatch.setattr(train, "run_ranks", lambda *words: pytest.fail("something started"))
    monkeypatch.chdir(REPO)
    for name, value in box.env(TRAIN_DOES="exit 5").items():
        monkeypatch.setenv(name, value)
    assert run_verb("train", *words) == 5
    assert box.recorded("python") == ["train.py", *words]


def test_outside_of_the_repository_train_py_is_named_in_full(start, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert start("name=x").command == ["python", str(REPO / "train.py"), "name=x"]


def test_what_the_check_refuses_is_not_started(monkeypatch, capsys):
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(train, "run_ranks", lambda *words: pytest.fail("something started"))
    assert run_verb("train", "optim.lrr=1") == 2
    message = "error: optim.lrr=1: there is no such field; did you mean optim.lr?\n"
    assert capsys.readouterr() == ("", message)
