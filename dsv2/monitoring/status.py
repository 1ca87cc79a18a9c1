"""RUN_DIR/status.json, for scripts that requeue a run: `{"state": ..., "step": ..., "total_steps": ...}`.

The state is `running`, `stopped`, `finished` or `failed`.
"""

import json
from pathlib import Path
from typing import Any

STATUS = "status.json"


def write_status(run_dir: Path, status: dict[str, Any]) -> None:
    """Replace the file whole.

    Raises:
        OSError: it cannot be written.
    """
    partial = run_dir / f"{STATUS}.partial"
    partial.write_text(json.dumps(status) + "\n", encoding="utf-8")
    partial.replace(run_dir / STATUS)


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return the file's content; {} if it is missing or cannot be read."""
    try:
        return json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
