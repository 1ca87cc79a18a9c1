"""A checkpoint as files: is it whole, and do they hold what was written?

`state.json`, written last, lists every file's size and CRC-32. Sizes are compared whenever a checkpoint is
opened (`check`). Reading all bytes takes time, so a run compares them only before it resumes
(`damaged_file`).
"""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv2.errors import UserError

FORMAT = "dsv2-checkpoint-1"
STATE_FILE = "state.json"


def check(path: Path, option: str | None = None) -> dict[str, Any]:
    """Return the content of a whole checkpoint's state.json.

    Args:
        option: how the user named the path, such as "resume=PATH"; errors begin with it.

    Raises:
        UserError: `path` is missing, foreign, torn or truncated; the text says which file and how.
    """
    option = option or f"checkpoint {path}"
    if not path.is_dir():
        raise UserError(f"{option}: there is no such folder of a checkpoint, or of a run")
    try:
        content = json.loads((path / STATE_FILE).read_text())
    except FileNotFoundError:
        if inside := complete_checkpoints(path):
            raise UserError(f"{option}: holds checkpoints; give one of them, {inside[0]}") from None
        raise UserError(
            f"{option}: no {STATE_FILE}; it is no dsv2 checkpoint, or its writing was cut short"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{option}: {STATE_FILE} cannot be read ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{option}: {STATE_FILE} is not of the format {FORMAT}")
    for name, size in content.get("files", {"every file": 1}).items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            how = "is missing" if found is None else f"has {found} bytes of {size}"
            raise UserError(f"{option}: {name} {how}; use an older checkpoint")
    return content


def find_checkpoint(path: Path, option: str | None = None) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest whole one of a run's folder.

    Args:
        option: how the user named the path; errors begin with it.

    Raises:
        UserError: it is neither.
    """
    if not (path / "checkpoints").is_dir():
        check(path, option)
        return path
    if checkpoints := complete_checkpoints(path / "checkpoints"):
        return checkpoints[0]
    raise UserError(f"{option or f'run {path}'}: no checkpoint in {path / 'checkpoints'} is whole")


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in the folder, whole or not, except those set aside."""
    return sorted((p for p in folder.glob("step-*") if not p.suffix), reverse=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in the folder, newest first."""
    found = []
    for path in newest_first(folder):
        try:
            check(path)
            found.append(path)
        except UserError:
            continue
    return found


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def damaged_file(path: Path, names: Iterable[str], checksums: dict[str, int]) -> str | None:
    """Return what is wrong with the first file whose bytes differ from those written; None if none does."""
    for name in names:
        try:
            found = checksum(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if found != checksums.get(name):
            return f"{name} does not hold what was written (its checksum differs)"
    return None


def sync_folder(folder: Path) -> None:
    """Make a rename in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
