"""train.py itself, run as a user runs it: torchrun, real files, signals, kills and a full disk."""

import json
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from data.prepared.manifest import load_manifest
from data.prepared.shards import ShardWriter, read_tokens
from data.streams.order import permuted_index
from tests.dist.end_to_end import (
    ENDLESS,
    MANY,
    MANY_STEPS,
    OFFLINE,
    PYTHON,
    ROOT,
    STEPS,
    TORCHRUN,
    TWO,
    assert_same_bits,
    kill_hard,
    read_wandb,
    run,
    scalars,
    wait_for_step,
    weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # `weights` wants it so
    pytest.mark.timeout(1800),
]


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
    assert sorted(scalars(run_dir, "train/loss")) == list(range(1, MANY_STEPS + 1))
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
    """Two processes, killed hard, then asked to stop; at the end all is as if nothing had happened."""
    job_command = command("killed", *TWO, MANY, OFFLINE, launcher=TORCHRUN)
    job = started(job_command)
    wait_for_step(tmp_path / "killed", 5)
    kill_hard(job)
    # Ctrl-C in a terminal reaches torchrun and its workers.
    job = started(job_command)
    wait_for_step(tmp_path / "killed", 20)
    for process in [*psutil.Process(job.pid).children(recursive=True), job]:
        process.send_signal(signal.SIGINT)
    job.wait(300)
    status = json.loads((tmp_path / "killed" / "status.json").read_text())
    assert status["state"] == "stopped"
    assert 20 <= status["step"] < MANY_STEPS
    output = run(job_command)
    assert f"resumed after step {status['step']}" in output

    undisturbed, killed = whole[0], tmp_path / "killed"
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/bpb"):
        want = scalars(undisturbed, name)
        # A job that is told to stop at a step due for evaluation leaves that out.
        got = {step: value for step, value in scalars(killed, name).items() if step != status["step"]}
        assert got == {step: value for step, value in want.items() if step != status["step"]}, name
    assert_same_bits(weights(killed, MANY_STEPS), weights(undisturbed, MANY_STEPS))
    assert json.loads((killed / "status.json").read_text())["state"] == "finished"
    read_wandb(killed, sessions=3)


def test_signal_saves_and_exits_0_then_another_layout_continues(command, started, whole, tmp_path):
    """SIGTERM to one process, then to torchrun alone, on EP 2 and ZeRO-3; one process finishes."""
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
    job.send_signal(signal.SIGTERM)  # as a scheduler does; torchrun passes it on and reports it by its code
    assert job.wait(300) == 1
    before, status = status, json.loads((tmp_path / "stopped" / "status.json").read_text())
    assert status["state"] == "stopped"
    assert before["step"] + 20 <= status["step"] < MANY_STEPS
    output = run(command("stopped", MANY))
    assert f"resumed after step {status['step']}" in output
    (note,) = [line for line in output.splitlines() if "note: changed since that checkpoint: " in line]
    assert "checkpoint.every 0 -> 4" in note
    assert "parallel.zero_stage 3 -> " in note
    losses, want = scalars(tmp_path / "stopped", "train/loss"), scalars(whole[0], "train/loss")
    assert losses.keys() == want.keys()
    # Many steps enlarge what another order of sums changes in the last bit.
    np.testing.assert_allclose([losses[s] for s in want], list(want.values()), rtol=1e-4)
    np.testing.assert_allclose([losses[s] for s in want][:20], list(want.values())[:20], rtol=2e-6)


def test_nan_stops_names_the_step_and_saves_nothing(command, begun, tmp_path):
    copytree(begun, tmp_path / "nan")
    before = weights(tmp_path / "nan", 12)
    command_line = command("nan", "optim.lr=1e30", "checkpoint.every=1", OFFLINE, *TWO, launcher=TORCHRUN)
    output = run(command_line, expect=1)  # torchrun's own code; it prints those of its workers
    assert output.count("error: step ") == 1
    assert "exitcode  : 3" in output
    assert "nothing saved" in output
    assert 'train.py", line' not in output, "a traceback of ours, not torchrun's"
    bad_step = int(output.split("error: step ")[1].split(":")[0])
    saved = sorted(int(p.name[5:]) for p in (tmp_path / "nan" / "checkpoints").iterdir())
    assert saved[-1] < bad_step
    for step in saved:
        assert all(torch.isfinite(t).all() for t in weights(tmp_path / "nan", step).values())
    assert_same_bits(weights(tmp_path / "nan", 12), before)


def test_a_second_job_in_the_same_folder_is_refused(command, tmp_path):
    job = subprocess.Popen(command("busy", ENDLESS), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        while not job.stdout.readline().startswith("step"):
            assert job.poll() is None
        output = run(command("busy", ENDLESS), expect=2)
        assert output.startswith("error: name=busy: ")
        assert f"is in use by process {job.pid} of " in output
        assert len(output.splitlines()) == 1
    finally:
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=300)
    assert job.returncode == 0


def test_interrupted_before_training(command, tmp_path):
    def heed_interrupts() -> None:  # a shell's background jobs, these tests maybe, are started to ignore them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(command("early"), cwd=ROOT, preexec_fn=heed_interrupts, **pipes)
    while not (tmp_path / "early" / ".lock-owner").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    output = job.communicate(timeout=300)[0]
    assert (job.returncode, output) == (
        130,
        "error: interrupted before training began; nothing was changed\n",
    )


def test_a_token_outside_the_vocabulary_is_told_by_the_rank_that_meets_it(command, corpus, tmp_path):
    """A shard of the right size that holds a wrong id, in a sequence that only rank 1 trains on."""
    folder = Path(copytree(corpus, tmp_path / "damaged"))
    manifest = load_manifest(folder)
    shard = folder / manifest.train.shards[0].file
    arrays = [array.copy() for array in read_tokens(shard)]
    # With 2 ranks and micro-batches of 2, rank 1 takes the third sequence of the run's order.
    sequences = (manifest.train.tokens - 1) // 32
    place = int(permuted_index(np.array([2]), sequences, seed=0, epoch=0)[0]) * 32 + 16
    for array in arrays:
        if 0 <= place < len(array):
            array[place] = 700
        place -= len(array)
    writer = ShardWriter(folder, shard.name, np.dtype(manifest.dtype))
    for array in arrays:
        writer.write([array], 0)
    size = writer.finish().file_bytes
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace(str(manifest.train.shards[0].file_bytes), str(size)))

    output = run(command("run", *TWO, f"data.path={folder}", launcher=TORCHRUN), expect=1)
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert told[0] == f"error: model.vocab_size=600: must be above 700, a token id in {shard}"
    assert len(told) <= 2, output
    assert all(line.startswith("error: another process has ended; its own") for line in told[1:]), output
    assert "exitcode  : 2" in output.split("Root Cause")[1]
    assert 'train.py", line' not in output, "no traceback of ours"


def test_full_disk_keeps_the_previous_checkpoint(command, begun, tmp_path):
    """The kernel refuses to let any file grow: the run goes on, and ends with one message and code 1."""
    copytree(begun, tmp_path / "full")
    checkpoints = tmp_path / "full" / "checkpoints"
    names = sorted(p.name for p in checkpoints.iterdir())
    assert names[-1] == "step-00000012"
    before = weights(tmp_path / "full", 12)

    def refuse_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    output = run(command("full"), expect=1, preexec_fn=refuse_large_files)
    assert "step-00000016 could not be written" in output
    assert "the run continues" in output
    assert "error: checkpoint" in output
    assert "step-00000024" in output
    assert "Traceback" not in output
    assert sorted(p.name for p in checkpoints.iterdir()) == names
    assert_same_bits(weights(tmp_path / "full", 12), before)
    assert "resumed after step 12" in run(command("full"))


def test_full_disk_for_metrics_and_status_does_not_end_the_run(command, tmp_path):
    """Every byte for metrics.jsonl is refused by the kernel, and status.json cannot be made."""
    run_dir = tmp_path / "run"
    (run_dir / "status.json").mkdir(parents=True)
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    output = run(command("run"))
    assert output.count("metrics.jsonl could not be written") == 1
    assert "status.json could not be written" in output
    assert (run_dir / "checkpoints" / f"step-{STEPS:08d}").exists()


def test_start_from_another_runs_checkpoint(command, begun, tmp_path):
    """resume=PATH of another run starts this one; run again, it goes on from its own."""
    source = begun / "checkpoints" / "step-00000008"
    output = run(command("other", OFFLINE, f"resume={source}", "stop_step=10"))
    assert "resumed after step 8" in output
    _, _, *overrides = command("other", f"resume={source}", "data.seed=9")
    found = run([PYTHON, "-m", "dsv2", "check", "1", *overrides], expect=2)  # before anything is started
    assert "error: the checkpoint is of other data: data.seed was 0, is 9; set" in found
    assert "resumed after step 10" in run(command("other", OFFLINE, f"resume={source}"))
    assert min(scalars(tmp_path / "other", "train/loss")) == 9
    ids = [
        json.loads((path / "state.json").read_text())["run"]["wandb_id"]
        for path in (source, tmp_path / "other" / "checkpoints" / f"step-{STEPS:08d}")
    ]
    assert None not in ids
    assert ids[0] != ids[1], "another run is another W&B run"


def test_long_context_stage(command, begun, tmp_path):
    """YaRN at twice the length: weights and moments come along; steps, tokens and data start anew."""
    source = begun / "checkpoints" / "step-00000012"
    lr = 1e-4
    stage = ["experiment=long_context", "model=debug", "runtime=default", f"resume={source}"]
    stage += ["model.max_position_embeddings=64", "data.sequence_length=64", "optim.warmup_steps=0"]
    stage += ["model.rope_scaling.original_max_position_embeddings=32", "model.rope_scaling.factor=2"]
    stage += ["optim.total_tokens=4096", f"optim.lr={lr}", "optim.decay_at=[]", "checkpoint.every=1"]
    output = run(command("long", *stage, "stop_step=2"))
    assert f"started from the weights of {source}" in output
    before, after = weights(begun, 12), weights(tmp_path / "long", 1)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith("fp32/"):
            assert (tensor - before[name]).abs().max() < 10 * lr, f"{name}: one step away"
        if name.startswith("exp_avg_sq/"):
            assert (tensor >= 0.949 * before[name]).all(), f"{name}: 0.95 of it, and a new square"
    assert any((before[name] > 0).any() for name in before if name.startswith("exp_avg_sq/"))

    assert "resumed after step 2" in run(command("long", *stage))
    long = tmp_path / "long"
    assert list(scalars(long, "train/tokens").values()) == [512 * step for step in range(1, 9)]
    assert set(scalars(long, "train/lr").values()) == {lr}
    state = json.loads((long / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["adam_step"] == 12 + 8
    assert state["run"]["data"]["consumed"] == 8 * 8
    assert state["run"]["data"]["fingerprint"]["sequence_length"] == 64
    # Twice the length and other frequencies cost little: the loss is far from where pretraining began.
    short_losses, long_losses = scalars(begun, "train/loss"), scalars(long, "train/loss")
    assert abs(long_losses[1] - short_losses[12]) < 0.25 * (short_losses[1] - short_losses[12])

    text = run([PYTHON, "-m", "dsv2", "generate", str(long), "--prompt", "alpha beta", "--max-tokens", "8"])
    assert f"{long / 'checkpoints' / 'step-00000008'}, fp32, " in text
    assert "\nalpha beta" in text


def test_damaged_checkpoint_falls_back_and_resume_never_overwrites_nothing(command, begun, tmp_path):
    copytree(begun, tmp_path / "torn")
    newest = tmp_path / "torn" / "checkpoints" / "step-00000012"
    data = newest / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    output = run(command("torn", f"resume={newest}"), expect=2)
    assert "__0_0.distcp has" in output
    assert output.count("error:") == 1
    assert "Traceback" not in output
    output = run(command("torn", "resume=never"), expect=2)
    assert "resume=never" in output
    assert "name=NAME" in output
    output = run(command("torn", "stop_step=9"))
    assert "warning:" in output
    assert "__0_0.distcp has" in output
    assert "resumed after step 8" in output


def test_streamed_dataset_stops_resumes_and_is_exact(command, corpus, tmp_path):
    """A Hugging Face dataset, tokenised on the fly, validated on held-out documents of the same split."""
    rng = np.random.default_rng(1)
    for shard in range(3):
        rows = [" ".join(rng.choice(["alpha", "beta", "def", "(", ")"], 60)) for _ in range(150)]
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / f"{shard}.jsonl").write_text(lines)
    stream = [
        "data=hf_stream",
        "data.dataset=json",
        f"data.data_files=['{tmp_path}/*.jsonl']",
        "data.lanes=3",
    ]
    stream += [
        f"data.tokenizer={corpus / 'tokenizer.model'}",
        "data.val_split=train",
        "data.shuffle_window=8",
    ]
    stream += ["data.sequence_length=32", "data.path=''"]
    run(command("whole", *stream))
    run(command("stopped", *stream, "stop_step=7"))
    assert "resumed after step 7" in run(command("stopped", *stream, *TWO, launcher=TORCHRUN))
    whole, stopped = scalars(tmp_path / "whole", "train/loss"), scalars(tmp_path / "stopped", "train/loss")
    assert {s: stopped[s] for s in range(1, 8)} == {s: whole[s] for s in range(1, 8)}
    np.testing.assert_allclose([stopped[s] for s in whole], list(whole.values()), rtol=2e-6)


@pytest.mark.full  # tests/dist/test_hf.py does the same without command lines
def test_export_and_start_from_it(command, tmp_path):
    """A run, exported in fp32: another run starts where that one ended, then goes on from its checkpoint."""
    run(command("one"))
    out = tmp_path / "exported"
    said = run([PYTHON, "-m", "dsv2", "export", str(tmp_path / "one"), str(out), "--dtype", "fp32"])
    assert f"wrote {out}" in said
    start = [f"init_from={out}", "optim.lr=1e-20", "optim.weight_decay=0", *TWO, "parallel.zero_stage=3"]
    output = run(command("two", *start, "stop_step=6", launcher=TORCHRUN))
    assert f"started from the weights of {out}" in output
    assert "note:" not in output
    end, begin = scalars(tmp_path / "one", "val/loss")[STEPS], scalars(tmp_path / "two", "val/loss")[6]
    assert begin == pytest.approx(end, rel=1e-6)
    shutil.rmtree(out)
    output = run(command("two", *start, launcher=TORCHRUN))
    path = tmp_path / "two" / "checkpoints" / "step-00000006"
    assert f"note: init_from={out} is ignored: the run continues from {path}" in output
    assert "resumed after step 6" in output


def test_a_bad_folder_to_start_from_stops_the_run(command, tmp_path):
    output = run(command("bad", f"init_from={tmp_path / 'gone'}"), expect=2)
    assert output.startswith(f"error: init_from={tmp_path / 'gone'}: there is no such folder")
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "bad").exists()
