"""`python -m dsv2 train`: the processes it starts, what it appends, and what it becomes.

Programs are recording stand-ins, so the machine's own GPUs do not matter.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from dsv2.cli import train
from dsv2.errors import UserError
from tests.unit.helpers import REPO, run_verb
from tests.unit.sandbox import Sandbox

QUICKSTART = "experiment=quickstart"


class Became(Exception):
    """Stands for os.execvpe, which does not return."""


class Started(NamedTuple):
    command: list[str]
    variables: dict[str, str]
    checked: tuple[int, list[str]] | None


@pytest.fixture
def start(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Started]:
    """Run the verb in the repository with these variables; return what it became."""
    checked: list[tuple[int, list[str]]] = []
    became: list[tuple[list[str], dict[str, str]]] = []

    def execvpe(file: str, command: list[str], variables: dict[str, str]) -> None:
        assert file == command[0]
        became.append((command, variables))
        raise Became

    monkeypatch.setattr(train.os, "execvpe", execvpe)
    monkeypatch.setattr(train, "check", lambda *words: checked.append(words))
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(train.sys, "executable", str(box.root / ".venv/bin/python"))
    monkeypatch.chdir(REPO)
    for name in [*train.settings(1, {}), "NPROC", "CUDA_VISIBLE_DEVICES", "GPUS", "NNODES"]:
        monkeypatch.delenv(name, raising=False)

    def run(*words: str, **variables: str) -> Started:
        for name, value in box.env(**variables).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Became):
            run_verb("train", *words)
        return Started(*became.pop(), checked.pop() if checked else None)

    return run


def arguments(started: Started) -> list[str]:
    assert Path(started.command[0]).name == "torchrun"
    return started.command[1:]


def test_without_gpus_two_processes_start(box, start, capsys):
    started = start(QUICKSTART, "name=a b")
    expected = ["--standalone", "--nproc_per_node=2", "train.py", QUICKSTART, "name=a b"]
    assert arguments(started) == expected
    assert capsys.readouterr().out == (
        "+ OMP_NUM_THREADS=4 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 MALLOC_MMAP_THRESHOLD_=33554432"
        f" MALLOC_TRIM_THRESHOLD_=268435456 {box.bin}/torchrun --standalone --nproc_per_node=2"
        f" train.py {QUICKSTART} 'name=a b'\n"
    )
    assert started.variables["OMP_NUM_THREADS"] == "4"
    assert started.variables["RECORDS"] == str(box.records), "the user's own variables are kept"
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
    expected = ["--standalone", f"--nproc_per_node={processes}", "train.py", *overrides]
    assert arguments(started) == expected
    assert started.variables["OMP_NUM_THREADS"] == threads
    assert started.checked == (processes, overrides)


@pytest.mark.parametrize(
    ("gpus", "processes"),
    [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 4), (8, 8), (9, 8), (16, 8)],
)
def test_the_quickstart_starts_as_many_processes_as_fit_its_batch(start, capsys, gpus, processes):
    started = start(QUICKSTART, GPUS=str(gpus))
    assert arguments(started)[1] == f"--nproc_per_node={processes}"
    printed = capsys.readouterr().out
    assert (f"quickstart: {processes} processes on {gpus} GPUs" in printed) == (processes < gpus)
    appended = [f"runtime.micro_batch_size={8 // processes}"] if processes > 2 else []
    assert [word for word in arguments(started) if "micro_batch_size" in word] == appended


@pytest.mark.parametrize(
    ("overrides", "variables", "processes"),
    [([QUICKSTART], {"NPROC": "6"}, 6), (["experiment=other"], {}, 7), ([f"name={QUICKSTART}"], {}, 7)],
)
def test_a_given_number_or_another_experiment_gets_all_processes(start, overrides, variables, processes):
    assert arguments(start(*overrides, GPUS="7", **variables))[1] == f"--nproc_per_node={processes}"


@pytest.mark.parametrize("variables", [{"NPROC": "1"}, {"GPUS": "1"}])
def test_one_process_turns_expert_parallelism_off_and_says_so(start, capsys, variables):
    started = start(QUICKSTART, **variables)
    expected = ["--standalone", "--nproc_per_node=1", "train.py", QUICKSTART]
    assert arguments(started) == [*expected, "parallel.expert_parallel_size=1"]
    assert started.checked == (1, [QUICKSTART, "parallel.expert_parallel_size=1"])
    assert capsys.readouterr().out.startswith("one process: appending parallel.expert_parallel_size=1")


@pytest.mark.parametrize("given", ["parallel.expert_parallel_size=2", "++parallel.expert_parallel_size=1"])
def test_one_process_leaves_a_given_size_alone(start, capsys, given):
    started = start(given, "name=x", NPROC="1")
    assert arguments(started) == ["--standalone", "--nproc_per_node=1", "train.py", given, "name=x"]
    assert "appending" not in capsys.readouterr().out


@pytest.mark.parametrize("nproc", ["0", "two", "-1"])
def test_a_wrong_nproc_is_refused(monkeypatch, capsys, nproc):
    monkeypatch.setenv("NPROC", nproc)
    monkeypatch.setattr(train, "become", lambda *words: pytest.fail("something started"))
    assert run_verb("train") == 2
    assert capsys.readouterr() == ("", f"error: NPROC={nproc}: must be a whole number, at least 1\n")


def test_the_torchrun_beside_this_python_goes_first(box, start):
    box.program(box.root / ".venv/bin/torchrun", "#!/bin/bash\n")
    assert start().command[0] == str(box.root / ".venv/bin/torchrun")


def test_no_torchrun_is_a_mistake_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(train.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match=f"^torchrun: not found beside {tmp_path}/python; run `make train`"):
        train.torchrun()


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({}, ["--rdzv_id=dsv2"]),
        ({"NODE_RANK": "0"}, ["--rdzv_id=dsv2", "--rdzv_conf=is_host=true"]),
        ({"NODE_RANK": "2", "RDZV_ID": "7"}, ["--rdzv_id=7", "--rdzv_conf=is_host=false"]),
    ],
)
def test_one_of_several_machines(start, capsys, variables, options):
    several = {"NNODES": "3", "HEAD": "node0:29500", "NPROC": "1"}
    started = start(QUICKSTART, **several, **variables)
    rendezvous = ["--nnodes=3", "--rdzv_backend=c10d", "--rdzv_endpoint=node0:29500", *options]
    assert arguments(started) == [*rendezvous, "--nproc_per_node=1", "train.py", QUICKSTART]
    assert started.checked is None, "this machine does not know how many processes the others start"
    assert "expert_parallel_size" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "0", "HEAD": "a:1"}, "NNODES=0: must be the number of machines"),
        ({"NNODES": "2"}, "HEAD=: must be host:port"),
        ({"NNODES": "2", "HEAD": "node0"}, "HEAD=node0: must be host:port"),
        ({"NNODES": "2", "HEAD": "a:1", "NODE_RANK": "b"}, "NODE_RANK=b: must be a whole number"),
    ],
)
def test_wrong_variables_of_several_machines_are_refused(variables, message):
    with pytest.raises(UserError, match=f"^{message}"):
        train.find_machines(variables)


@pytest.mark.parametrize(
    "words", [["--cfg", "job", "model=lite"], ["-c", "job"], ["model=lite", "--cfg", "job"], ["--cfg=job"]]
)
def test_a_question_to_hydra_goes_to_train_py(box, start, capsys, words):
    started = start(*words)
    assert started.command == [str(box.root / ".venv/bin/python"), "train.py", *words]
    assert started.checked is None
    assert capsys.readouterr().out == ""


def test_outside_of_the_repository_train_py_is_named_in_full(start, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert arguments(start("name=x"))[2:] == [str(REPO / "train.py"), "name=x"]


def test_what_the_check_refuses_is_not_started(monkeypatch, capsys):
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(train, "become", lambda *words: pytest.fail("something started"))
    assert run_verb("train", "optim.lrr=1") == 2
    message = "error: optim.lrr=1: there is no such field; did you mean optim.lr?\n"
    assert capsys.readouterr() == ("", message)


def test_it_becomes_torchrun_so_signals_and_exit_code_pass(box):
    does = 'trap "exit 9" TERM; echo $$ >"$RECORDS/pid"; for ((i = 0; i < 400; i++)); do sleep 0.05; done'
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); from dsv2.cli import train; "
    code += f"from dsv2.__main__ import VERBS, main; train.sys.executable = {str(box.bin / 'python')!r}; "
    code += "train.check = lambda *words: None; sys.exit(main(['train'], VERBS))"
    variables = box.env(TORCHRUN_DOES=does)
    with subprocess.Popen([sys.executable, "-c", code], cwd=box.root, env=variables) as process:
        deadline = time.monotonic() + 60
        pid_file = box.records / "pid"
        while not (pid_file.exists() and pid_file.read_text().strip()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        assert int(pid_file.read_text()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 9
