"""Weights that are no longer numbers: never a checkpoint, never a finished run."""

import json
from shutil import copytree

from tests.dist.end_to_end import TORCHRUN, TWO, run

OVERFLOW = ["optim.lr=3e38", "optim.warmup_steps=0", "optim.decay_at=[]"]


def saved(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def test_the_first_update_overflows_and_the_run_starts_again(command, tmp_path):
    output = run(command("first", *OVERFLOW, "checkpoint.every=1"), expect=3)
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [
        "error: step 1: the update made weights or optimizer states infinite or NaN; this step is not saved; "
        "try a lower optim.lr; there is no checkpoint yet"
    ]
    assert saved(tmp_path / "first") == []
    run(command("first", "stop_step=2"))
    assert saved(tmp_path / "first") == ["step-00000002"]


def test_the_last_update_overflows_on_two_ranks(command, begun, tmp_path):
    """Losses and gradients were finite up to the end; only the weights are not."""
    copytree(begun, tmp_path / "last")
    before = saved(tmp_path / "last")
    end = ["optim.total_tokens=3328", "checkpoint.every=0"]  # 13 steps
    output = run(command("last", *OVERFLOW, *end, *TWO, launcher=TORCHRUN), expect=1)  # torchrun's own code
    assert output.count("error: step 13: the update made weights or optimizer states infinite or NaN") == 1
    good = tmp_path / "last" / "checkpoints" / "step-00000012"
    assert f"try a lower optim.lr; the last good checkpoint is {good}\n" in output
    assert "exitcode  : 3" in output
    assert saved(tmp_path / "last") == before
    assert before[-1] == good.name
    assert json.loads((tmp_path / "last" / "status.json").read_text())["state"] == "failed"
