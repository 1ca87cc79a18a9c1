"""The launchers, run with recording stand-ins for the programs they start.

Each test works in a copy with a PATH of its own, so neither the machine's GPUs nor its SLURM matter.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.unit.sandbox import ROOT, Sandbox

SCRIPTS = ["launch/local.sh", "launch/multinode.sh", "launch/slurm.sbatch", ".ci/run"]
# What the launcher of a train.py that saves on TERM does if another machine has failed meanwhile.
SAVES_ON_TERM = """
trap 'echo "{\\"state\\": \\"$ENDS_AS\\", \\"step\\": 7}" >runs/lite/status.json; exit 1' TERM
echo $$ >"$RECORDS/pid"
for ((i = 0; i < 400; i++)); do sleep 0.05; done
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_are_strict(script):
    path = ROOT / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.parametrize("script", ["multinode.sh", "slurm.sbatch"])
def test_help_is_the_header_with_an_example(box, script):
    done = box.run(f"launch/{script}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Train ")
    assert "\nUsage: " in done.stdout
    assert f"launch/{script} " in done.stdout.split("\nExample: ")[1].splitlines()[0]
    assert "set -euo" not in done.stdout
    assert box.recorded("python") == []


@pytest.mark.parametrize("own", [False, True])
def test_local_is_the_verb_train_of_the_repository_s_own_python_if_there_is_one(box, own):
    if own:
        box.program(box.root / ".venv/bin/python", '#!/bin/bash\necho "own $*"\nexit 5\n')
    done = subprocess.run(
        [str(box.root / "launch/local.sh"), "name=a b", "--cfg", "job"],
        cwd="/",
        env=box.env(TRAIN_DOES="exit 5", PWD="/"),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 5
    words = ["-m", "dsv2", "train", "name=a b", "--cfg", "job"]
    assert done.stdout == (f"own {' '.join(words)}\n" if own else "")
    assert box.recorded("python") == ([] if own else words)


@pytest.mark.parametrize(("script", "env"), [("local.sh", {}), ("multinode.sh", {"NNODES": "1"})])
def test_relative_paths_stay_relative_to_the_callers_folder(box, tmp_path, script, env):
    """As for train.py; the repository is found all the same."""
    box.program(box.root / ".venv/bin/python", '#!/bin/bash\npwd\necho "$PYTHONPATH"\n')
    done = subprocess.run(
        [str(box.root / "launch" / script)],
        cwd=tmp_path,
        env=box.env(PYTHONPATH="mine", **env),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == f"{tmp_path}\n{box.root}:mine\n"


def test_local_becomes_python_so_signals_and_exit_code_pass(box):
    does = 'trap "exit 9" TERM; echo $$ >"$RECORDS/pid"; for ((i = 0; i < 400; i++)); do sleep 0.05; done'
    box.program(box.root / ".venv/bin/python", f"#!/bin/bash\n{does}\n")
    with subprocess.Popen(["launch/local.sh"], cwd=box.root, env=box.env()) as process:
        wait_for(box.records / "pid")
        assert int((box.records / "pid").read_text()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 9


def test_torchrun_knows_the_shutdown_timeout_by_that_name(monkeypatch):
    from torch.distributed.launcher.api import LaunchConfig

    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "77")
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == 77


def test_multinode_is_the_verb_train_with_these_variables(box):
    box.run("launch/multinode.sh", "name=x", NNODES="3", HEAD="node0:29500", NODE_RANK="2")
    assert box.recorded("python") == ["-m", "dsv2", "train", "name=x"]
    variables = box.recorded_env()
    assert (variables["NNODES"], variables["HEAD"], variables["NODE_RANK"]) == ("3", "node0:29500", "2")


def test_multinode_needs_the_number_of_machines(box):
    done = box.run("launch/multinode.sh", HEAD="a:1")
    assert (done.returncode, done.stderr) == (2, "error: NNODES: must be given, the number of machines\n")
    assert box.recorded("python") == []


def run_slurm(box: Sandbox, *overrides: str, send: signal.Signals | None = None, **more: str) -> int:
    """Run the job script, as SLURM does from a copy elsewhere, send it a signal once training runs."""
    job = {
        "TRAIN_DOES": SAVES_ON_TERM if "ENDS_AS" in more else "",
        "SLURM_SUBMIT_DIR": str(box.root),
        "SLURM_JOB_ID": "61234",
        "SLURM_JOB_NODELIST": "node[7-9]",
        "SLURM_CPUS_ON_NODE": "96",
        "GPUS": "8",
    }
    copy = shutil.copy(box.root / "launch" / "slurm.sbatch", box.records)
    with subprocess.Popen(["bash", copy, *overrides], env=box.env(**{**job, **more}), cwd="/") as process:
        if send is not None:
            wait_for(box.records / "pid")
            process.send_signal(send)
        return process.wait(timeout=30)


def test_slurm_commands(box):
    assert run_slurm(box, "name=lite", "model=lite") == 0
    assert box.recorded("scontrol") == ["show", "hostnames", "node[7-9]"]
    assert " ".join(box.recorded("srun")) == (
        "--nodes=3 --ntasks-per-node=1 --cpus-per-task=96 --wait=60 launch/multinode.sh name=lite model=lite"
    )
    assert box.recorded("python") == ["-m", "dsv2", "train", "name=lite", "model=lite"]
    variables = box.recorded_env()
    found = [variables[name] for name in ("NNODES", "HEAD", "RDZV_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")]
    assert found == ["3", "node7:21234", "61234-0", "150"]
    assert box.recorded("scancel") == []


@pytest.mark.parametrize(
    ("send", "ends_as", "code", "requeued"),
    [
        (signal.SIGUSR1, "stopped", 0, ["requeue", "61234"]),  # the time limit
        (signal.SIGUSR1, "finished", 0, []),  # the time limit, just after the last step
        (signal.SIGTERM, "stopped", 1, []),  # scancel: the user does not want it back
    ],
)
def test_slurm_signals_save_and_only_the_time_limit_requeues(box, send, ends_as, code, requeued):
    assert run_slurm(box, "name=lite", send=send, ENDS_AS=ends_as) == code
    assert box.recorded("scancel") == ["--signal=TERM", "61234"]
    assert f'"{ends_as}"' in (box.root / "runs/lite/status.json").read_text()
    assert box.recorded("scontrol")[3:] == requeued


def test_slurm_failure_is_passed_on_and_not_repeated(box):
    assert run_slurm(box, "name=lite", TRAIN_DOES="exit 3") == 3
    assert "requeue" not in box.recorded("scontrol")


def test_slurm_finds_the_status_below_another_runs_dir(box):
    (box.root / "elsewhere" / "lite").mkdir(parents=True)
    does = 'echo "{\\"state\\": \\"finished\\"}" >elsewhere/lite/status.json; exit 1'
    assert run_slurm(box, "runs_dir=elsewhere", "name=lite", TRAIN_DOES=does) == 0


@pytest.mark.parametrize(
    ("given", "appended"),
    [
        (["resume=never"], ["resume=auto"]),
        (["resume=runs/base/checkpoints/step-00000100"], []),  # before the first save there is no other
        (["resume=auto"], []),
        ([], []),
    ],
)
def test_slurm_restart_resumes_in_a_rendezvous_of_its_own(box, given, appended):
    assert run_slurm(box, "name=lite", *given, SLURM_RESTART_COUNT="2") == 0
    assert box.recorded("python") == ["-m", "dsv2", "train", "name=lite", *given, *appended]
    assert box.recorded_env()["RDZV_ID"] == "61234-2"


def test_slurm_first_start_appends_nothing(box):
    assert run_slurm(box, "name=lite", "resume=never") == 0
    assert box.recorded("python") == ["-m", "dsv2", "train", "name=lite", "resume=never"]


def test_slurm_needs_a_name(box):
    assert run_slurm(box, "model=lite") == 2
    assert box.recorded("srun") == []


def test_slurm_directives_fit_together():
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--signal=B:USR1@180", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(
        directives
    )
    # sbatch stops reading directives at the first command.
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH "))
    assert all(line == "" or line.startswith("#") for line in lines[:last])
