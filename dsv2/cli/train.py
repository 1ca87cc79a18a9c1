"""Train on this machine: one process per GPU, or two processes on the CPU if there is no GPU.

    python -m dsv2 train experiment=quickstart name=first optim.lr=3e-4
    NPROC=1 python -m dsv2 train experiment=quickstart
    python -m dsv2 train --cfg job model=lite          prints the composed configuration, without training

The command checks the configuration, the data and the checkpoint. Then it starts the processes of train.py.
NPROC sets their number. CUDA_VISIBLE_DEVICES chooses the GPUs. OMP_NUM_THREADS sets the threads per process;
by default the cores are shared equally. The quickstart uses 1, 2, 4 or 8 GPUs, because that many can share
its batch.

NNODES=N HEAD=host:port starts this machine's part of a job on N machines; launch/multinode.sh explains these
variables. The job's configuration is then checked by train.py alone.

Ctrl-C or SIGTERM lets train.py finish its step, save and end with code 0. Processes that have not ended after
120 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT) are killed. A second Ctrl-C kills them at once, without saving.
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
from typing import NamedTuple

from dsv2.cli.adjust import QUICKSTART_BATCH, adjust, is_quickstart
from dsv2.cli.base import Verb
from dsv2.cli.check import check
from dsv2.cli.machines import find_machines
from dsv2.cli.ranks import run_ranks
from dsv2.errors import UserError

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = 2  # processes
PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's name for it
SHUTDOWN_TIMEOUT = (
    120  # seconds; torchrun's own default, 30, is too short to save a large model after a signal
)
# By default glibc gives a freed tensor's memory back, and the kernel clears it page by page for the next
# tensor. That takes a tenth of a small model's time on the CPU. These values keep blocks of up to 32 MiB.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


class Launch(NamedTuple):
    """How the job is started on this machine."""

    processes: int
    overrides: list[str]  # the user's overrides, then the appended ones
    notes: list[str]  # a line for each choice that the user might not expect


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
    quickstart = is_quickstart(overrides, machines)
    if text := environment.get("NPROC"):
        if not re.fullmatch(r"[1-9][0-9]*", text):
            raise UserError(f"NPROC={text}: must be a whole number, at least 1")
        processes = int(text)
    else:
        gpus = count_gpus(overrides, environment) or WITHOUT_GPU
        processes = max(n for n in (1, 2, 4, QUICKSTART_BATCH) if n <= gpus) if quickstart else gpus
        if processes < gpus:
            notes.append(f"quickstart: {processes} processes on {gpus} GPUs; NPROC=N starts N")
    adjusted = adjust(overrides, processes, machines)
    return Launch(processes, adjusted.overrides, [*notes, *adjusted.notes])


def settings(processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of the job: the user's values, or defaults."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    defaults = {"OMP_NUM_THREADS": str(threads), PATIENCE: str(SHUTDOWN_TIMEOUT)}
    return {name: environment.get(name) or value for name, value in (defaults | MALLOC).items()}


def patience_s(variables: Mapping[str, str]) -> float:
    """Return how many seconds the processes have to end after a signal.

    Raises:
        UserError: the variable is no positive number.
    """
    text = variables[PATIENCE]
    if not re.fullmatch(r"[0-9]*[1-9][0-9]*", text):
        raise UserError(f"{PATIENCE}={text}: must be a whole number of seconds, at least 1")
    return float(text)


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

    def run(self, options: Namespace) -> int:
        script = "train.py" if Path.cwd() == ROOT else str(ROOT / "train.py")
        words: list[str] = options.words
        command = [sys.executable, script]
        if any(word.split("=")[0] in ("--cfg", "-c") for word in words):
            return subprocess.run(
                [*command, *words], check=False
            ).returncode  # Hydra prints the configuration
        machines = find_machines(os.environ)
        launch = plan_launch(words, os.environ, machines.count)
        variables = settings(launch.processes, os.environ)
        patience = patience_s(variables)
        for note in launch.notes:
            print(note, flush=True)
        if machines.count == 1:
            check(launch.processes, launch.overrides)  # a mistake is told before any process starts
        command += launch.overrides
        shown = [f"{name}={value}" for name, value in variables.items()]
        print("+", " ".join(shown), shlex.join(command), f"({launch.processes} processes)", flush=True)
        return run_ranks(command, launch.processes, machines, variables, patience)
