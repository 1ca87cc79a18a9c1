"""The quickstart as a newcomer runs it, but shorter: it stops, goes on, and learns."""

import re
import subprocess
from pathlib import Path

import pytest

from dsv2.monitoring.sessions import read_sessions
from tests.dist.end_to_end import PYTHON, ROOT, TORCHRUN, read_wandb, run, scalars
from tests.unit.helpers import wandb_history

pytestmark = pytest.mark.timeout(1800)
STEPS, BATCH = 80, 4


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The running Python's own sources, prepared as by `make train`."""
    out = tmp_path_factory.mktemp("prepared") / "stdlib"
    prepare = [PYTHON, "-m", "data.prepare", "stdlib", "--out", str(out)]
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
    return out


def test_quickstart_stops_goes_on_and_beats_the_frequencies_of_tokens(stdlib, tmp_path):
    command = [*TORCHRUN, "train.py", "experiment=quickstart", f"data.path={stdlib}", f"runs_dir={tmp_path}"]
    # A fraction of its tokens in smaller batches; offline, whatever account there may be.
    command += [f"optim.total_tokens={STEPS * BATCH * 256}", "optim.warmup_steps=10", "logging.wandb=offline"]
    command += [f"optim.batch_size={BATCH}", "runtime.micro_batch_size=2"]
    earlier = run([*command, "stop_step=30"])
    assert "stopped at stop_step=30" in earlier
    output = run(command)
    assert "resumed after step 30" in output
    # Each part of a start that may take long has a line before it.
    checkpoint = tmp_path / "quickstart" / "checkpoints" / "step-00000030"
    slow = ["importing torch and DeepSpeed", "building the model", f"loading {checkpoint}", "starting W&B"]
    lines = output.splitlines()
    assert [line for line in lines if line in slow] == slow
    assert lines.index("evaluating on 64 sequences") < lines.index("drawing a sample of 64 tokens")

    run_dir = tmp_path / "quickstart"
    log = (run_dir / "console.log").read_text()
    said = re.split(r"(?m)^=====.* train\.py experiment=quickstart .*\n", log)
    assert [said[0], said[1].rstrip(), said[2].rstrip()] == ["", earlier.rstrip(), output.rstrip()]
    sessions = read_sessions(run_dir)
    assert [(session["step"], session["machines"][0]["processes"]) for session in sessions] == [
        (0, 2),
        (30, 2),
    ]
    losses = scalars(run_dir, "train/loss_lm")
    assert sorted(losses) == list(range(1, STEPS + 1))
    found = re.search(r"validation loss ([\d.]+) nats per token; .* ([\d.]+) \(unigram entropy\)\n", output)
    assert found, output
    loss, unigram = float(found[1]), float(found[2])
    assert 5.5 < unigram < 7
    assert loss == pytest.approx(scalars(run_dir, "val/loss")[STEPS], abs=1e-3)
    assert loss < unigram - 0.3, "it has learned more than how often each token occurs"
    sample = output.split("\nsample:\n")[1].splitlines()
    assert sample[0].startswith("  | ")
    assert f"finished: step {STEPS}/{STEPS}" in output

    first, second = map(wandb_history, read_wandb(run_dir, sessions=2))
    assert (sorted(first), sorted(second)) == (list(range(1, 31)), list(range(31, STEPS + 1)))
    assert {step: row["train/loss_lm"] for step, row in (first | second).items()} == losses
    assert second[STEPS]["val/loss"] == scalars(run_dir, "val/loss")[STEPS]
