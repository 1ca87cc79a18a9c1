"""train.py as a user runs it, and what goes wrong: numbers, files, disks and folders."""

import os
import resource
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from data.prepared.manifest import load_manifest, to_json
from data.prepared.shards import ShardWriter, read_tokens
from data.streams.order import permuted_index
from tests.dist.end_to_end import ENDLESS, OFFLINE, ROOT, STEPS, TORCHRUN, TWO, assert_same_bits, run, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # `weights` wants it so
    pytest.mark.timeout(1800),
]


def test_nan_stops_names_the_step_and_saves_nothing(command, begun, tmp_path):
    copytree(begun, tmp_path / "nan")
    before = weights(tmp_path / "nan", 12)
    command_line = command("nan", "optim.lr=1e30", "checkpoint.every=1", OFFLINE, *TWO, launcher=TORCHRUN)
    output = run(command_line, expect=1)  # torchrun's own code; it prints those of its workers
    assert output.count("error: step ") == 1
    assert "exitcode  : 3" in output
    assert "this step is not saved; try a lower optim.lr; the last good checkpoint is " in output
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
        first, refusal = output.splitlines()
        assert first == "importing torch and DeepSpeed"
        assert refusal.startswith("error: name=busy: ")
        assert f"is in use by process {job.pid} of " in refusal
        assert "is in use" not in (tmp_path / "busy" / "console.log").read_text(), "another job's log"
    finally:
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=300)
    assert job.returncode == 0


def test_a_token_outside_the_vocabulary_is_told_by_the_rank_that_meets_it(command, corpus, tmp_path):
    """A shard that was written with a wrong id, in a sequence that only rank 1 trains on."""
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
    written = replace(writer.finish(), documents=manifest.train.documents)
    train = replace(manifest.train, shards=(written, *manifest.train.shards[1:]))
    (folder / "manifest.json").write_text(to_json(replace(manifest, train=train)))

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


def test_neither_a_full_disk_for_metrics_and_status_nor_the_terminal_ends_the_run(command, tmp_path):
    """Every byte for metrics.jsonl is refused by the kernel, and the other files cannot be made."""
    run_dir = tmp_path / "где" / "run"  # its name is printed, and Latin-1 has no such letters
    for name in ("status.json", "console.log", "sessions.jsonl"):
        (run_dir / name).mkdir(parents=True)
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    where = f"runs_dir='{run_dir.parent}'"
    output = run(command("run", where), env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert r"\u0433\u0434\u0435" in output
    assert output.count("metrics.jsonl could not be written") == 1
    assert output.count("console.log could not be written") == 1
    assert output.count("sessions.jsonl could not be written") == 1
    assert "status.json could not be written" in output
    assert (run_dir / "checkpoints" / f"step-{STEPS:08d}").exists()


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


def test_a_bad_folder_to_start_from_stops_the_run(command, tmp_path):
    output = run(command("bad", f"init_from={tmp_path / 'gone'}"), expect=2)
    assert output.startswith(f"error: init_from={tmp_path / 'gone'}: there is no such folder")
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "bad").exists()
