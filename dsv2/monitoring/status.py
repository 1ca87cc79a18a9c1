"""RUN_DIR/status.json, for scripts that requeue a run: `{"state": ..., "step": ..., "total_steps": ...}`.

The state is `running`, `stopped`, `finished` or `failed`. A run that failed names the step of its newest
checkpoint, because the steps after it are lost.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from data.reading import read_json
from dsv2.checkpoint.files import newest_step
from dsv2.errors import Unreadable, UserError

STATUS = "status.json"


def write_status(run_dir: Path, status: dict[str, Any]) -> None:
    """Replace the file whole.

    Raises:
        OSError: it cannot be written.
    """
    partial = run_dir / f"{STATUS}.partial"
    partial.write_text(json.dumps(status) + "\n", encoding="utf-8")
    partial.replace(run_dir / STATUS)


def mark_failed(run_dir: Path) -> None:
    """Turn `running` into `failed`, for a run that cannot do so itself. An unwritable file stays."""
    with contextlib.suppress(OSError, Unreadable, UserError):
        status = read_status(run_dir)
        if status.get("state") == "running":
            saved = newest_step(run_dir / "checkpoints")
            step = status.get("step", 0) if saved is None else saved
            write_status(run_dir, status | {"state": "failed", "step": step})


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return the file's content; {} if there is none.

    Raises:
        UserError: the file does not hold what `write_status` wrote.
        Unreadable: the file system refuses to read the file.
    """
    path = run_dir / STATUS
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); remove the file") from None
    kinds = {"state": str, "step": int, "total_steps": int}
    if not isinstance(content, dict) or not all(
        isinstance(value, kinds.get(name, object)) for name, value in content.items()
    ):
        raise UserError(f"{path}: is not the status of a run; remove the file")
    return content
