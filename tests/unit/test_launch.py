"""The launchers, Makefile and CI script, run with recording stand-ins for the programs they start.

Each test works in a copy with a PATH of its own, so neither the machine's GPUs nor its SLURM matter.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["launch/common.sh", "launch/local.sh", "launch/multinode.sh", "launch/slurm.sbatch", ".ci/run"]

RECORD = '#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@" >>"$RECORDS/${0##*/}"\n'
STANDINS = {
    "torchrun": RECORD + 'env >"$RECORDS/env"\neval "${TORCHRUN_DOES:-}"\n',
    "python": RECORD + 'exit "${CHECK_ENDS:-0}"\n',
    "nvidia-smi": '#!/bin/bash\nfor ((i = 0; i < ${GPUS:-0}; i++)); do echo "GPU $i: H100"; done\n',
    "nproc": "#!/bin/bash\necho 8\n",
    "srun": RECORD + 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": RECORD + '[[ $1 == requeue ]] || printf "node7\\nnode8\\nnode9\\n"\n',
    "scancel": RECORD + 'kill -TERM "$(<"$RECORDS/pid")"\n',
}
# What torchrun does with a train.py that saves on TERM: it ends with an error all the same.
SAVES_ON_TERM = """
trap 'echo "{\\"state\\": \\"$ENDS_AS\\", \\"step\\": 7}" >runs/lite/status.json; exit 1' TERM
echo $$ >"$RECORDS/pid"
for ((i = 0; i < 400; i++)); do sleep 0.05; done
"""


class Sandbox:
    """A copy of the launchers, stand-ins on PATH, and what these recorded."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "repo"
        self.records = tmp_path / "records"
        self.bin = tmp_path / "bin"
        for folder in (self.root / "runs" / "lite", self.records, self.bin):
            folder.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        shutil.copy(ROOT / "Makefile", self.root)
        for name, text in STANDINS.items():
            self.program(self.bin / name, text)

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def env(self, **more: str) -> dict[str, str]:
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "RECORDS": str(self.records), **more}

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.root, env=self.env(**env), capture_output=True, text=True, timeout=30
        )

    def recorded(self, program: str) -> list[str]:
        """The arguments of every call of the program, one after the other."""
        path = self.records / program
        return [line for line in path.read_text().splitlines() if line != program] if path.exists() else []

    def recorded_env(self) -> dict[str, str]:
        lines = (self.records / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def box(tmp_path):
    return Sandbox(tmp_path)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_are_strict(script):
    path = ROOT / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    if script != "launch/common.sh":  # sourced
        assert os.access(path, os.X_OK)
        assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh", "slurm.sbatch"])
def test_help_is_the_header_with_an_example(box, script):
    done = box.run(f"launch/{script}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Train ")
    assert "\nUsage: " in done.stdout
    assert f"launch/{script} " in done.stdout.split("\nExample: ")[1].splitlines()[0]
    assert "set -euo" not in done.stdout
    assert box.recorded("torchrun") == []


def test_local_without_gpus_starts_two_processes(box):
    done = box.run("launch/local.sh", "experiment=quickstart", "name=a b")
    expected = ["--standalone", "--nproc_per_node=2", "train.py", "experiment=quickstart", "name=a b"]
    assert box.recorded("torchrun") == expected
    assert done.stdout == (
        "+ OMP_NUM_THREADS=4 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 torchrun --standalone --nproc_per_node=2"
        " train.py experiment=quickstart name=a\\ b\n"
    )
    assert box.recorded_env()["OMP_NUM_THREADS"] == "4"
    assert box.recorded_env()["PWD"] == str(box.root)


@pytest.mark.parametrize(
    ("env", "overrides", "processes", "threads"),
    [
        ({"GPUS": "4"}, [], 4, "2"),
        ({"GPUS": "4", "CUDA_VISIBLE_DEVICES": "1,3"}, [], 2, "4"),
        ({"GPUS": "4", "CUDA_VISIBLE_DEVICES": "GPU-8a,GPU-9b,GPU-c"}, [], 3, "2"),
        ({"GPUS": "4", "CUDA_VISIBLE_DEVICES": ""}, [], 2, "4"),
        ({"GPUS": "4", "CUDA_VISIBLE_DEVICES": "-1"}, [], 2, "4"),
        ({"GPUS": "4"}, ["parallel.device=cpu"], 2, "4"),
        ({"GPUS": "4", "NPROC": "3"}, [], 3, "2"),
        ({"NPROC": "16"}, [], 16, "1"),
        ({"OMP_NUM_THREADS": "5"}, [], 2, "5"),
    ],
)
def test_local_processes_and_threads(box, env, overrides, processes, threads):
    box.run("launch/local.sh", *overrides, **env)
    assert box.recorded("torchrun") == [
        "--standalone",
        f"--nproc_per_node={processes}",
        "train.py",
        *overrides,
    ]
    assert box.recorded_env()["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("env", [{"NPROC": "1"}, {"GPUS": "1"}])
def test_local_with_one_process_turns_expert_parallelism_off_and_says_so(box, env):
    done = box.run("launch/local.sh", "experiment=quickstart", **env)
    expected = ["--standalone", "--nproc_per_node=1", "train.py", "experiment=quickstart"]
    assert box.recorded("torchrun") == [*expected, "parallel.expert_parallel_size=1"]
    assert done.stdout.startswith("one process: appending parallel.expert_parallel_size=1")


@pytest.mark.parametrize("given", ["parallel.expert_parallel_size=2", "++parallel.expert_parallel_size=1"])
def test_local_with_one_process_leaves_a_given_size_alone(box, given):
    done = box.run("launch/local.sh", given, "name=x", NPROC="1")
    assert box.recorded("torchrun") == ["--standalone", "--nproc_per_node=1", "train.py", given, "name=x"]
    assert "appending" not in done.stdout


@pytest.mark.parametrize("nproc", ["0", "two", "-1"])
def test_local_refuses_a_wrong_nproc(box, nproc):
    done = box.run("launch/local.sh", NPROC=nproc)
    assert done.returncode == 2
    assert f"NPROC={nproc}: it must be a whole number, at least 1" in done.stderr
    assert box.recorded("torchrun") == []


def test_local_prefers_the_repository_s_own_torchrun(box):
    box.program(box.root / ".venv/bin/torchrun", '#!/bin/bash\necho "own $*"\n')
    done = box.run(str(box.root / "launch" / "local.sh"))
    assert done.stdout.splitlines()[1] == "own --standalone --nproc_per_node=2 train.py"
    assert box.recorded("torchrun") == []


def test_local_becomes_torchrun_so_signals_and_exit_code_pass(box):
    does = 'trap "exit 9" TERM; echo $$ >"$RECORDS/pid"; for ((i = 0; i < 400; i++)); do sleep 0.05; done'
    with subprocess.Popen(["launch/local.sh"], cwd=box.root, env=box.env(TORCHRUN_DOES=does)) as process:
        wait_for(box.records / "pid")
        assert int((box.records / "pid").read_text()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 9


def test_torchrun_knows_the_shutdown_timeout_by_that_name(monkeypatch):
    from torch.distributed.launcher.api import LaunchConfig

    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "77")
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == 77


@pytest.mark.parametrize(
    ("rank", "host"),
    [
        ({}, ""),
        ({"NODE_RANK": "0"}, " --rdzv_conf=is_host=true"),
        ({"NODE_RANK": "2"}, " --rdzv_conf=is_host=false"),
    ],
)
def test_multinode_command(box, rank, host):
    box.run("launch/multinode.sh", "name=x", NNODES="3", HEAD="node0:29500", GPUS="8", **rank)
    assert " ".join(box.recorded("torchrun")) == (
        "--nnodes=3 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=node0:29500 --rdzv_id=dsv2"
        f"{host} train.py name=x"
    )


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"HEAD": "a:1"}, "NNODES=: it must be the number of machines"),
        ({"NNODES": "0", "HEAD": "a:1"}, "NNODES=0: it must be"),
        ({"NNODES": "2"}, "HEAD=: it must be host:port"),
        ({"NNODES": "2", "HEAD": "node0"}, "HEAD=node0: it must be host:port"),
        ({"NNODES": "2", "HEAD": "a:1", "NODE_RANK": "b"}, "NODE_RANK=b: it must be"),
    ],
)
def test_multinode_refuses(box, env, message):
    done = box.run("launch/multinode.sh", **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert box.recorded("torchrun") == []


def run_slurm(box: Sandbox, *overrides: str, send: signal.Signals | None = None, **more: str) -> int:
    """Run the job script, as SLURM does from a copy elsewhere, send it a signal once training runs."""
    job = {
        "TORCHRUN_DOES": SAVES_ON_TERM if "ENDS_AS" in more else "",
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
    assert " ".join(box.recorded("torchrun")) == (
        "--nnodes=3 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=node7:21234 --rdzv_id=61234-0"
        " train.py name=lite model=lite"
    )
    assert box.recorded_env()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "150"
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
    assert run_slurm(box, "name=lite", TORCHRUN_DOES="exit 3") == 3
    assert "requeue" not in box.recorded("scontrol")


def test_slurm_finds_the_status_below_another_runs_dir(box):
    (box.root / "elsewhere" / "lite").mkdir(parents=True)
    does = 'echo "{\\"state\\": \\"finished\\"}" >elsewhere/lite/status.json; exit 1'
    assert run_slurm(box, "runs_dir=elsewhere", "name=lite", TORCHRUN_DOES=does) == 0


def test_slurm_restart_resumes_in_a_rendezvous_of_its_own(box):
    assert run_slurm(box, "name=lite", "resume=never", SLURM_RESTART_COUNT="2") == 0
    arguments = box.recorded("torchrun")
    assert arguments[4:] == ["--rdzv_id=61234-2", "train.py", "name=lite", "resume=never", "resume=auto"]


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


# A Python whose `-m venv` makes an environment of recording programs; its version and pip can fail.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
-V) echo Python 3.10.4 ;;
-c*) exit "${OLD:-0}" ;;
"-m venv .venv")
    mkdir -p .venv/bin
    for name in python ruff pyright torchrun; do cp "$0" .venv/bin/$name; done ;;
*"pip install"*) echo pip >>"$RECORDS/made"; exit "${PIP_FAILS:-0}" ;;
*) echo "${0##*/} $*" >>"$RECORDS/made" ;;
esac
"""


@pytest.fixture
def make(box):
    box.program(box.bin / "python3", FAKE_PYTHON)
    (box.root / "requirements.txt").write_text("torch\n")

    def run(*words: str, **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        made = box.records / "made"
        made.unlink(missing_ok=True)
        done = box.run("make", *words, **env)
        return done, made.read_text().splitlines() if made.exists() else []

    return run


def test_make_train_installs_prepares_and_trains(make):
    done, made = make("train", "ARGS=optim.lr=1e-3 name=x")
    assert done.returncode == 0, done.stderr
    assert made == [
        "pip",
        "python -m data.prepare stdlib",
        "python -m dsv2.check 2 experiment=quickstart optim.lr=1e-3 name=x",
        "torchrun --standalone --nproc_per_node=2 train.py experiment=quickstart optim.lr=1e-3 name=x",
    ]
    assert "installing requirements.txt into .venv" in done.stdout


def test_make_test_checks_format_and_lint_first(make):
    lint = ["ruff check .", "ruff format --check ."]
    assert make("test")[1] == ["pip", *lint, "python -m pytest -m not full"]
    assert make("test-all")[1] == [*lint, "python -m pytest"]
    assert make("lint")[1][-1].strip() == "pyright"


def test_make_installs_again_only_for_new_requirements(make, box):
    assert make("format")[1][0] == "pip"
    assert "pip" not in make("format")[1]
    later = time.time() + 10
    os.utime(box.root / "requirements.txt", (later, later))
    assert make("format")[1][0] == "pip"


def test_make_does_not_count_a_failed_installation(make, box):
    done, made = make("train", PIP_FAILS="1")
    assert done.returncode != 0
    assert made == ["pip"]
    assert make("format")[1][0] == "pip"  # it starts again
    assert "pip" not in make("format")[1]
    # Nor does an older success count once a newer attempt has failed, whatever the file's times say.
    later = time.time() + 10
    os.utime(box.root / "requirements.txt", (later, later))
    assert make("format", PIP_FAILS="1")[0].returncode != 0
    os.utime(box.root / "requirements.txt", (1, 1))
    assert make("format")[1][0] == "pip"


def test_make_refuses_an_old_or_missing_python(make, box):
    done, made = make("train", OLD="1")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        "Python 3.11 or newer is needed, but 'python3' is Python 3.10.4; give one with make PYTHON=python3.11"
    )
    done, _ = make("train", "PYTHON=no-such-python")
    assert "but 'no-such-python' is missing" in done.stderr.splitlines()[0]
    assert made == []
    assert not (box.root / ".venv").exists()


def test_make_clean_keeps_runs_and_prepared_data(make, box):
    for folder in ("runs/lite/__pycache__", "prepared/stdlib", "dsv2/__pycache__", ".venv", ".ruff_cache"):
        (box.root / folder).mkdir(parents=True)
    assert make("clean")[0].returncode == 0
    left = {str(path.relative_to(box.root)) for path in box.root.rglob("*") if path.is_dir()}
    assert {"runs/lite/__pycache__", "prepared/stdlib"} <= left
    assert not {"dsv2/__pycache__", ".venv", ".ruff_cache"} & left


def test_ci_runs_make_test_in_a_fresh_environment(box):
    box.program(
        box.bin / "make", RECORD + '[[ ! -e .venv && -z ${PYTHONPATH:-} ]] && exit "${MAKE_EXIT:-0}"\n'
    )
    (box.root / ".venv").mkdir()
    done = subprocess.run([str(box.root / ".ci/run")], cwd="/", env=box.env(PYTHONPATH="/x"), timeout=20)
    assert done.returncode == 0
    assert box.recorded("make") == ["test"]
    assert box.run(".ci/run", MAKE_EXIT="5").returncode == 5


def test_local_ends_with_the_checks_exit_code(box):
    done = box.run("launch/local.sh", "optim.lrr=1", CHECK_ENDS="2")
    assert done.returncode == 2
    assert box.recorded("python") == ["-m", "dsv2.check", "2", "optim.lrr=1"]
    assert not (box.records / "torchrun").exists()
