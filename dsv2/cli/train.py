"""Train on this machine: one process per GPU, or two processes on the CPU if there is no GPU.

    python -m dsv2 train experiment=quickstart name=first optim.lr=3e-4
    NPROC=1 python -m dsv2 train experiment=quickstart
    python -m dsv2 train --cfg job model=lite          prints the composed configuration, without training

The command checks the configuration, the data and the checkpoint. Then it becomes torchrun, which starts
train.py. NPROC sets the number of processes. CUDA_VISIBLE_DEVICES chooses the GPUs. OMP_NUM_THREADS sets the
threads per process; by default the cores are shared equally. The quickstart uses 1, 2, 4 or 8 GPUs, because
that many can share its batch.

NNODES=N HEAD=host:port starts this machine's part of a job on N machines; launch/multinode.sh explains these
variables. The job's configuration is then checked by train.py alone.

On Ctrl-C or SIGTERM train.py saves and ends with code 0. torchrun itself then always prints a SignalException
and exits with 1. After 120 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT) it kills the processes that are still running.
launch/slurm.sbatch starts jobs on several machines under SLURM.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from dsv2.cli.base import Verb
from dsv2.cli.check import check
from dsv2.errors import UserError

ROOT = Path(__file__).parents[2]
QUICKSTART = "experiment=quickstart"
QUICKSTART_BATCH = 8  # sequences
WITHOUT_GPU = 2  # processes
# torchrun's own default, 30 s, is too short to save a large model after a signal.
SHUTDOWN_TIMEOUT = 120
# By default glibc gives a freed tensor's memory back, and the kernel clears it page by page for the next
# tensor. That takes a tenth of a small model's time on the CPU. These values keep blocks of up to 32 MiB.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


class Launch(NamedTuple):
    """How the job is started on this machine."""

    processes: int
    overrides: list[str]  # the user's overrides, then the appended ones
    notes: list[str]  # a line for each choice that the user might not expect


class Machines(NamedTuple):
    """The machines of the job."""

    count: int
    options: list[str]  # torchrun's, by which the machines find one another


def find_machines(environment: Mapping[str, str]) -> Machines:
    """Read NNODES, HEAD, NODE_RANK and RDZV_ID; without NNODES the job is on this machine alone.

    Raises:
        UserError: one of them has a wrong value.
    """
    count = environment.get("NNODES")
    if not count:
        return Machines(1, ["--standalone"])
    head = environment.get("HEAD", "")
    rank = environment.get("NODE_RANK", "")
    if not re.fullmatch(r"[1-9][0-9]*", count):
        raise UserError(f"NNODES={count}: must be the number of machines, at least 1")
    if not re.fullmatch(r".+:[0-9]+", head):
        raise UserError(f"HEAD={head}: must be host:port, one of the machines and a free port on it")
    if not re.fullmatch(r"[0-9]*", rank):
        raise UserError(f"NODE_RANK={rank}: must be a whole number, 0 on HEAD")
    name = environment.get("RDZV_ID") or "dsv2"
    options = [f"--nnodes={count}", "--rdzv_backend=c10d", f"--rdzv_endpoint={head}", f"--rdzv_id={name}"]
    if rank:
        # The c10d rendezvous knows no node rank; all it needs is which machine opens HEAD's port.
        options.append(f"--rdzv_conf=is_host={'true' if int(rank) == 0 else 'false'}")
    return Machines(int(count), options)


def count_gpus(overrides: list[str], environment: Mapping[str, str]) -> int:
    """Return the number of GPUs that train.py will use: 0 if an override says runtime.device=cpu."""
    if "runtime.device=cpu" in overrides or not shutil.which("nvidia-smi", path=environment.get("PATH")):
        return 0
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        # Numbers or UUIDs; an empty list and -1 hide every GPU.
        return sum(bool(re.match(r" *[0-9GM]", name)) for name in visible.split(","))
    command = ["nvidia-smi", "-L"]
    listed = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, check=False
    ).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def plan_launch(overrides: list[str], environment: Mapping[str, str], machines: int = 1) -> Launch:
    """Choose the number of processes on this machine, and the overrides that follow from it.

    Raises:
        UserError: NPROC is no positive whole number.
    """
    notes: list[str] = []
    appended: list[str] = []
    quickstart = QUICKSTART in overrides and machines == 1
    if text := environment.get("NPROC"):
        if not re.fullmatch(r"[1-9][0-9]*", text):
            raise UserError(f"NPROC={text}: must be a whole number, at least 1")
        processes = int(text)
    else:
        gpus = count_gpus(overrides, environment) or WITHOUT_GPU
        processes = max(n for n in (1, 2, 4, QUICKSTART_BATCH) if n <= gpus) if quickstart else gpus
        if processes < gpus:
            notes.append(f"quickstart: {processes} processes on {gpus} GPUs; NPROC=N starts N")
    if processes * machines == 1 and not any("parallel.expert_parallel_size=" in word for word in overrides):
        notes.append("one process: appending parallel.expert_parallel_size=1, whatever the experiment says")
        appended.append("parallel.expert_parallel_size=1")
    if quickstart and processes in (4, 8) and not any("runtime.micro_batch_size=" in w for w in overrides):
        share = f"runtime.micro_batch_size={QUICKSTART_BATCH // processes}"
        notes.append(f"quickstart: appending {share}, one process's share of the batch")
        appended.append(share)
    return Launch(processes, [*overrides, *appended], notes)


def settings(processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of the job: the user's values, or defaults."""
    # torchrun's own default is 1 thread per process, which leaves cores idle.
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    defaults = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT)}
    return {name: environment.get(name) or value for name, value in (defaults | MALLOC).items()}


def torchrun() -> str:
    """Return the path of torchrun: beside this Python, else on PATH.

    Raises:
        UserError: torchrun is in neither place.
    """
    beside = Path(sys.executable).with_name("torchrun")
    if beside.exists():
        return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    if on_path := shutil.which("torchrun"):
        return on_path
    raise UserError(
        f"torchrun: not found beside {sys.executable}; run `make train`, or activate an environment"
    )


def become(command: list[str], variables: dict[str, str]) -> NoReturn:
    """Replace this process by the command. Signals then reach torchrun, which passes them on to train.py."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, {**os.environ, **variables})


class Train(Verb):
    name = "train"
    help = "train a model on this machine, on all its GPUs or on the CPU"
    text = __doc__

    def arguments(self, parser: ArgumentParser) -> None:
        overrides = "Fields of the configuration and options of its groups, listed below."
        parser.add_argument("overrides", nargs="*", default=[], metavar="NAME=VALUE", help=overrides)
        shown = "Print the composed configuration and do not train."
        parser.add_argument("-c", "--cfg", choices=["job"], help=shown)

        from dsv2.config.fields import help_text

        parser.epilog = help_text()

    def parse(self, words: list[str]) -> Namespace:
        if words and words[0] in ("-h", "--help"):
            self.parser().parse_args(words)
        # An override such as --optim.lr=1 is left to the configuration, whose message names the field.
        return Namespace(words=words)

    def run(self, options: Namespace) -> NoReturn:
        script = "train.py" if Path.cwd() == ROOT else str(ROOT / "train.py")
        words: list[str] = options.words
        if any(
            word.split("=")[0] in ("--cfg", "-c") for word in words
        ):  # train.py lets Hydra print the configuration
            become([sys.executable, script, *words], {})
        machines = find_machines(os.environ)
        launch = plan_launch(words, os.environ, machines.count)
        for note in launch.notes:
            print(note, flush=True)
        if machines.count == 1:
            # A mistake is one line and exit code 2 here. torchrun would add its own report and exit with 1.
            check(launch.processes, launch.overrides)
        command = [torchrun(), *machines.options, f"--nproc_per_node={launch.processes}", script]
        command += launch.overrides
        variables = settings(launch.processes, os.environ)
        shown = [f"{name}={value}" for name, value in variables.items()]
        print("+", " ".join(shown), shlex.join(command))
        become(command, variables)
