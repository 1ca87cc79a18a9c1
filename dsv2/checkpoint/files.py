"""A checkpoint as files: are they complete, and do they hold the bytes that were written?

`state.json`, written last, has its own CRC-32, and every other file's size and CRC-32. `check` compares its
own CRC-32 and the sizes whenever a checkpoint is opened. Reading all bytes takes time, so `damaged_file`
compares the other files' CRC-32s only before their content is used.
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
STATE_FIELDS = {"format", "run", "adam_step", "config", "files", "crc32", "state_crc32"}


def state_text(content: dict[str, Any]) -> str:
    """Return the text of state.json: the content and its CRC-32."""
    return json.dumps(content | {"state_crc32": _state_crc32(content)}, indent=1)


def _state_crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def check(path: Path, option: str | None = None) -> dict[str, Any]:
    """Return the content of a whole checkpoint's state.json.

    Args:
        option: how the user named the path, such as "resume=PATH"; errors begin with it.

    Raises:
        UserError: `path` is missing, is no checkpoint, or is incomplete; the message names the file.
    """
    option = option or f"checkpoint {path}"
    if not path.is_dir():
        raise UserError(f"{option}: there is no such folder; must be a checkpoint or a run's folder")
    try:
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if inside := complete_checkpoints(path):
            raise UserError(f"{option}: holds checkpoints; give one of them, such as {inside[0]}") from None
        raise UserError(
            f"{option}: no {STATE_FILE}; it is no dsv2 checkpoint, or writing it was interrupted"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{option}: {STATE_FILE} cannot be read ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{option}: {STATE_FILE} is not of the format {FORMAT}")
    if unknown := sorted(content.keys() - STATE_FIELDS):
        raise UserError(f"{option}: {STATE_FILE} has the unknown field {unknown[0]!r}; use a newer dsv2")
    # Checkpoints of earlier versions have no checksum of state.json.
    if (written := content.pop("state_crc32", None)) not in (None, _state_crc32(content)):
        raise UserError(
            f"{option}: {STATE_FILE} does not hold what was written (its checksum is not {written}); use an "
            "older checkpoint"
        )
    for name, size in content.get("files", {"every file": 1}).items():
        file = path / name
        actual_size = file.stat().st_size if file.exists() else None
        if actual_size != size:
            problem = "is missing" if actual_size is None else f"has {actual_size} bytes of {size}"
            raise UserError(f"{option}: {name} {problem}; use an older checkpoint")
    return content


def find_checkpoint(path: Path, option: str | None = None) -> Path:
    """Return the checkpoint that `path` means: `path` itself, or the newest whole one in a run's folder.

    Args:
        option: how the user named the path; errors begin with it.

    Raises:
        UserError: `path` is no checkpoint, or is a run's folder without a whole one.
    """
    if not (path / "checkpoints").is_dir():
        check(path, option)
        return path
    if checkpoints := complete_checkpoints(path / "checkpoints"):
        return checkpoints[0]
    raise UserError(f"{option or f'run {path}'}: no checkpoint in {path / 'checkpoints'} is whole")


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in the folder, newest first, whole or not, except those set aside."""
    return sorted((p for p in folder.glob("step-*") if not p.suffix), reverse=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in the folder, newest first."""
    complete = []
    for path in newest_first(folder):
        try:
            check(path)
            complete.append(path)
        except UserError:
            continue
    return complete


def last_good(folder: Path) -> str:
    """Return a clause that names the newest whole checkpoint in the folder, or says that there is none."""
    whole = complete_checkpoints(folder)
    return f"the last good checkpoint is {whole[0]}" if whole else "there is no checkpoint yet"


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def damaged_file(path: Path, names: Iterable[str], checksums: dict[str, int]) -> str | None:
    """Describe the first file whose bytes are not those that were written. None if every file is intact."""
    for name in names:
        try:
            actual = checksum(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if actual != checksums.get(name):
            return f"{name} does not hold what was written (its checksum differs)"
    return None


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
