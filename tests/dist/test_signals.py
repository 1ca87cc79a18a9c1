"""train.py as a user runs it, killed, interrupted or asked to stop."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.dist.end_to_end import (
    LAUNCHER,
    MANY,
    MANY_STEPS,
    OFFLINE,
    ROOT,
    TORCHRUN,
    TWO,
    assert_same_bits,
    read_wandb,
    run,
    scalars,
    wait_for_checkpoint,
    wait_for_step,
    weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # `weights` wants it so
    pytest.mark.timeout(1800),
]


# A line of a run that goes well. The first line is the command.
IS_OUTPUT = re.compile(
    r"\+ |importing torch|building the model|loading |starting W&B|W&B is offline|killed: |  \w+ |step +\d|"
    r"evaluating on |eval +\d|warning: training waited "  # for a busy disk
).match


def listening_addresses(pid: int) -> set[str]:
    """The addresses on which a process and its children wait for connections."""
    job = psutil.Process(pid)
    connections = [c for process in [job, *job.children(recursive=True)] for c in process.net_connections()]
    assert len(connections) > 2
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="module")
def whole(run_command, tmp_path_factory) -> tuple[Path, str]:
    """A run of two processes that nobody interrupts, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    output = run(run_command(folder, "whole", *TWO, MANY, OFFLINE, launcher=TORCHRUN))
    return folder / "whole", output


def test_a_whole_run_prints_keeps_and_logs(whole):
    run_dir, output = whole
    assert "validation loss" in output
    assert "unigram entropy" in output
    assert "sample:" in output
    assert sorted(scalars(run_dir, "train/loss_total")) == list(range(1, MANY_STEPS + 1))
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000080", "step-00000082"]
    assert "n_routed_experts: 16" in (run_dir / "config.yaml").read_text()
    # The offline W&B run holds what metrics.jsonl mirrors.
    shown = read_wandb(run_dir, sessions=1)[0]
    for name in ("train/loss_lm", "moe/aux_device", "vio/L01", "comm/devs_per_tok", "val/bpb"):
        assert f'"{name}"' in shown, name
    assert "n_routed_experts" in shown, "the configuration is logged"
    pictures = [p.name for p in run_dir.glob("wandb/offline-run-*/files/media/images/map/*")]
    for name in ("expert_load", "dev_load", "dev_recv"):
        assert any(picture.startswith(f"{name}_") for picture in pictures), name


def test_killed_run_resumes_to_the_bit_and_reads_back(command, started, whole, tmp_path):
    """One of two processes is killed, then both are asked to stop; in the end nothing is lost."""
    job_command = command("killed", *TWO, MANY, OFFLINE, launcher=TORCHRUN)
    overrides = job_command[job_command.index("train.py") + 1 :]
    job = started([*LAUNCHER, *overrides], tmp_path / "output")
    wait_for_checkpoint(tmp_path / "killed")  # the W&B run's id is in it
    rank = psutil.Process(job.pid).children()[1]
    rank.kill()
    begin = time.monotonic()
    assert job.wait(300) == 1
    assert time.monotonic() - begin < 60, "15 s, or more on a busy machine"
    errors = [line for line in (tmp_path / "output").read_text().splitlines() if not IS_OUTPUT(line)]
    assert len(errors) == 1, errors
    assert re.fullmatch(rf"error: rank 1 on \S+ \(process {rank.pid}\) has ended; .*", errors[0])
    assert json.loads((tmp_path / "killed" / "status.json").read_text())["state"] == "failed"
    # Ctrl-C in a terminal reaches the launcher alone.
    job = started([*LAUNCHER, *overrides], tmp_path / "output")
    wait_for_step(tmp_path / "killed", 20)
    assert listening_addresses(job.pid) == {"127.0.0.1"}
    job.send_signal(signal.SIGINT)
    assert job.wait(300) == 0
    status = json.loads((tmp_path / "killed" / "status.json").read_text())
    assert status["state"] == "stopped"
    lines = (tmp_path / "output").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("warning: training waited ")]
    answer = lines.index(f"finishing step {status['step']}, then saving")
    assert len(lines[answer + 1 :]) == 2, "that step's line, and one that says how the run ended"
    assert lines[-1].startswith("stopped (the same command continues from here): step ")
    assert 20 <= status["step"] < MANY_STEPS
    output = run(job_command)
    assert f"resumed after step {status['step']}" in output

    undisturbed, killed = whole[0], tmp_path / "killed"
    for name in ("train/loss_total", "train/grad_norm", "val/loss", "val/bpb"):
        want = scalars(undisturbed, name)
        # A job that is told to stop at a step due for evaluation leaves that out.
        got = {step: value for step, value in scalars(killed, name).items() if step != status["step"]}
        assert got == {step: value for step, value in want.items() if step != status["step"]}, name
    assert_same_bits(weights(killed, MANY_STEPS), weights(undisturbed, MANY_STEPS))
    assert json.loads((killed / "status.json").read_text())["state"] == "finished"
    read_wandb(killed, sessions=3)


def test_signal_saves_and_exits_0_then_another_layout_continues(command, started, whole, tmp_path):
    """SIGTERM to one process, then SIGKILL to torchrun alone, on EP 2 and ZeRO-3; one process finishes."""
    job = started(command("stopped", MANY, "checkpoint.every=0"))
    wait_for_step(tmp_path / "stopped", 2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(300) == 0
    status = json.loads((tmp_path / "stopped" / "status.json").read_text())
    assert status["state"] == "stopped"
    assert 2 <= status["step"] < MANY_STEPS - 20
    layout = [*TWO, MANY, "parallel.zero_stage=3", "runtime.micro_batch_size=1"]
    job = started(command("stopped", *layout, "checkpoint.every=0", launcher=TORCHRUN))
    wait_for_step(tmp_path / "stopped", status["step"] + 20)
    ranks = psutil.Process(job.pid).children()
    job.kill()  # torchrun has no time to pass anything on
    assert not psutil.wait_procs(ranks, timeout=300)[1]
    before, status = status, json.loads((tmp_path / "stopped" / "status.json").read_text())
    assert status["state"] == "stopped"
    assert before["step"] + 20 <= status["step"] < MANY_STEPS
    output = run(command("stopped", MANY))
    assert f"resumed after step {status['step']}" in output
    (note,) = [line for line in output.splitlines() if "note: changed since that checkpoint: " in line]
    assert "checkpoint.every 0 -> 4" in note
    assert "parallel.zero_stage 3 -> " in note
    losses, want = scalars(tmp_path / "stopped", "train/loss_total"), scalars(whole[0], "train/loss_total")
    assert losses.keys() == want.keys()
    # Many steps enlarge what another order of sums changes in the last bit.
    np.testing.assert_allclose([losses[s] for s in want], list(want.values()), rtol=1e-4)
    np.testing.assert_allclose([losses[s] for s in want][:20], list(want.values())[:20], rtol=2e-6)


def test_interrupted_before_training(command, tmp_path):
    def heed_interrupts() -> None:  # a shell's background jobs, these tests maybe, are started to ignore them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(command("early"), cwd=ROOT, preexec_fn=heed_interrupts, **pipes)
    while not (tmp_path / "early" / ".lock-owner").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    *before, last = job.communicate(timeout=300)[0].splitlines()
    assert (job.returncode, last) == (130, "error: interrupted before training began; nothing was changed")
    assert before in ([], ["importing torch and DeepSpeed"]), "whether the signal or the line came first"
