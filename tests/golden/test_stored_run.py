"""A run that an older version left behind goes on as that version would have.

Commit 297f927 wrote `stored_run/` on a CPU: a prepared corpus, a run stopped after step 8 of 16, and the
losses of its other steps. The stored configuration has fields under their old names.
"""

import json
import shutil
from pathlib import Path

import pytest

from dsv2.monitoring.records import read_metrics
from tests.dist.end_to_end import PYTHON, run

STORED = Path(__file__).with_name("stored_run")
TOLERANCE = 1e-4  # relative, as for the golden curves: other CPUs sum in another order


def test_a_stored_run_resumes(tmp_path):
    expected = json.loads((STORED / "expected.json").read_text())
    corpus = STORED / "corpus"
    run_dir = tmp_path / "stored"
    shutil.copytree(STORED / "run", run_dir)
    where = [f"data.path={corpus}", f"runs_dir={tmp_path}", "name=stored"]
    moved = ["runtime.micro_batch_size=2", "runtime.recompute=true"]
    output = run([PYTHON, "train.py", *expected["overrides"], *moved, *where])
    assert "resumed after step 8" in output
    changed = next(line for line in output.splitlines() if line.startswith("note: changed since"))
    assert changed.endswith(f"checkpoint: data.path /tmp/fix/prepared -> {corpus}")  # and nothing else
    rows = read_metrics(run_dir)
    name = "train/loss_total"  # the stored steps, up to 8, have it under its old name
    losses = {str(row["step"]): row[name] for row in rows if name in row}
    assert losses == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert rows[-1]["val/loss"] == pytest.approx(expected["val_loss"], rel=TOLERANCE)
