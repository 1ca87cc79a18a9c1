"""Two jobs begin at the same time under one name."""

import json
import signal
from pathlib import Path

from dsv2.cli.base import ExitCode
from dsv2.monitoring.records import METRICS_FILE, read_metrics
from tests.dist.end_to_end import ENDLESS
from tests.soak.jobs import start_training


def race(processes: int, corpus: Path, folder: Path) -> str:
    """Start both, and stop the one that trains once the other one has ended.

    Raises:
        AssertionError: both or neither trained, or the other one did not end with one line.
    """
    run_dir = folder / "race"
    one = start_training(processes, corpus, run_dir, ENDLESS)
    other = start_training(processes, corpus, run_dir, ENDLESS)
    try:
        refused, trains = (
            (other, one) if one.reaches(lambda: other.process.poll() is not None) else (one, other)
        )
        assert trains.reaches((run_dir / METRICS_FILE).exists), "both have ended"
        trains.process.send_signal(signal.SIGTERM)
        trains.finish()
    finally:
        one.kill()
        other.kill()
    assert refused.process.returncode == ExitCode.mistake
    lines = [line for line in refused.lines() if not line.startswith("importing torch")]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: name={run_dir.name}: "), lines
    last = json.loads((run_dir / "status.json").read_text())["step"]
    assert [row["step"] for row in read_metrics(run_dir)] == list(range(1, last + 1))
    return f"one trained {last} steps until it was stopped; the other ended with code 2 and one line"
