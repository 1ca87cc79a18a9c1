"""What the tests of train.py share: its command lines, runs of it, and what these leave behind."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed.checkpoint as dcp

from dsv2.monitoring.records import read_metrics
from tests.dist.forked import ROOT, run_forked

PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LAUNCHER = [PYTHON, "-m", "dsv2", "train"]  # takes the overrides of train.py
TINY = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.vocab_size=600",
    "model.num_attention_heads=2",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=8",
    "model.intermediate_size=48",
    "model.moe_intermediate_size=16",
    "data=local",
    "data.sequence_length=32",
    "optim.batch_size=8",
    "optim.total_tokens=6144",  # 24 steps
    "optim.warmup_steps=2",
    "optim.lr=3e-3",
    "runtime.micro_batch_size=2",
    "eval.sequences=5",
    "eval.every=6",
    "eval.sample_tokens=4",
    "logging.every=2",
    "logging.wandb=disabled",
    "checkpoint.every=4",
]
STEPS = 24
TWO = ["parallel.expert_parallel_size=2"]
OFFLINE = "logging.wandb=offline"
MANY_STEPS = 82  # for jobs that are interrupted on their way and end like others
MANY = f"optim.total_tokens={MANY_STEPS * 256}"
ENDLESS = "optim.total_tokens=25600000"  # for a job that is there until it is told to stop


def write_texts(folder: Path) -> None:
    """40 small made-up sources, the same ones every time."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "import", "def", "class", "=", "+", "(", ")", "\n"]
    for index in range(40):
        (folder / f"{index:02d}.txt").write_text(" ".join(rng.choice(words, 400)))


def prepare_command(texts: Path, out: Path, *options: str) -> list[str]:
    """The command line that prepares the folder of `write_texts` for `TINY`."""
    prepare = [PYTHON, "-m", "data.prepare", "files", str(texts), "--out", str(out)]
    return [*prepare, "--vocab-size", "300", "--val-fraction", "0.2", *options]


def tiny_run(corpus: Path, runs_dir: Path, name: str, *overrides: str) -> list[str]:
    """The overrides of a tiny run on a prepared folder."""
    return [*TINY, f"data.path={corpus}", f"runs_dir={runs_dir}", f"name={name}", *overrides]


def run(command: list[str], expect: int = 0, **options: object) -> str:
    """Run to the end; its output. `expect` is the exit code.

    A command line of Python is forked (forked.py), and so are torchrun's two ranks if they should end well.
    With `options` of subprocess.run, the processes are real.
    """
    if not options and command[: len(TORCHRUN)] == TORCHRUN and expect == 0:
        codes, output = run_forked(command[len(TORCHRUN) :], world_size=2)
    elif not options and command[0] == PYTHON and command[: len(TORCHRUN)] != TORCHRUN:
        codes, output = run_forked(command[1:])
    else:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            **options,  # type: ignore[call-overload]
        )
        codes, output = [done.returncode], done.stdout
    assert codes == [expect] * len(codes), output
    return output


def kill_hard(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the job and, first, to all that it started: torchrun's workers outlive torchrun."""
    if job.poll() is None:
        parent = psutil.Process(job.pid)
        parent.suspend()  # or it would see its workers die
        for process in [*parent.children(recursive=True), parent]:
            process.kill()
    job.wait()


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and any(m["step"] >= step for m in read_metrics(run_dir)):
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run_dir} did not reach step {step}")


def wait_for_checkpoint(run_dir: Path) -> None:
    """Wait until the run has a whole checkpoint. Metrics may be a few steps ahead of it."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        if any(path.suffix == "" for path in (run_dir / "checkpoints").glob("step-*")):
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run_dir} has no checkpoint")


def scalars(run_dir: Path, name: str) -> dict[int, float]:
    return {int(m["step"]): m[name] for m in read_metrics(run_dir) if name in m}


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read whole in this process."""
    reader = dcp.FileSystemReader(run_dir / "checkpoints" / f"step-{step:08d}")
    tensors = {name: torch.empty(m.size) for name, m in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 30
    for name in one:
        assert torch.equal(one[name], other[name]), name


def read_wandb(run_dir: Path, sessions: int) -> list[str]:
    """What `wandb leet` reads in each of the run's offline folders, which are all of one W&B run."""
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == sessions
    assert len({folder.name.split("-")[-1] for folder in folders}) == 1, "one run has one id"
    wandb = str(Path(PYTHON).with_name("wandb"))
    return [run([wandb, "leet", "inspect", "--json", str(folder)]) for folder in folders]
