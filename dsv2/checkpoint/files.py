"""A checkpoint as files: are they complete, and do they hold the bytes that were written?

`state.json`, written last, has its own CRC-32, and every other file's size and CRC-32. `check` compares its
own CRC-32 and the sizes whenever a checkpoint is opened. Reading all bytes takes time, so `damaged_file`
compares the other files' CRC-32s only before their content is used.
"""

import itertools
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.reading import is_folder, is_plain_name, names_in, read_json, reading, size_of
from data.sealed import seal, unseal
from dsv2.checkpoint.state import RunState
from dsv2.errors import Unreadable, UserError

FORMAT = "dsv2-checkpoint-1"
STATE_FILE = "state.json"
_FIELDS: dict[str, type | tuple[type, ...]] = {  # of state.json, and their types
    "format": str,
    "run": dict,
    "adam_step": (int, float),
    "config": dict,
    "files": dict,  # name -> bytes
    "crc32": dict,  # name -> CRC-32
}
_MAY_LACK = {"files", "crc32"}  # `check` says which file is missing; earlier versions wrote no checksums


def state_text(content: dict[str, Any]) -> str:
    """Return the text of state.json: the content and its CRC-32."""
    return json.dumps(seal(content, "state_crc32"), indent=1)


def check(path: Path, option: str | None = None) -> dict[str, Any]:
    """Return the content of a whole checkpoint's state.json.

    Args:
        option: how the user named the path, such as "resume=PATH"; errors begin with it.

    Raises:
        UserError: `path` is missing, is no checkpoint, or is incomplete; the message names the file.
        Unreadable: the file system refuses to read `path`.
    """
    option = option or f"checkpoint {path}"
    if not is_folder(path):
        raise UserError(f"{option}: there is no such folder; must be a checkpoint or a run's folder")
    try:
        content = read_json(path / STATE_FILE)
    except FileNotFoundError:
        if inside := complete_checkpoints(path):
            raise UserError(f"{option}: holds checkpoints; give one of them, such as {inside[0]}") from None
        raise UserError(
            f"{option}: no {STATE_FILE}; it is no dsv2 checkpoint, or writing it was interrupted"
        ) from None
    except ValueError as error:
        raise UserError(f"{option}: {STATE_FILE} cannot be read ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{option}: {STATE_FILE} is not of the format {FORMAT}")
    if unknown := sorted(content.keys() - _FIELDS.keys() - {"state_crc32"}):
        raise UserError(f"{option}: {STATE_FILE} has the unknown field {unknown[0]!r}; use a newer dsv2")
    try:
        content = unseal(content, "state_crc32")
    except ValueError as error:
        raise UserError(f"{option}: {STATE_FILE} {error}; use an older checkpoint") from None
    _check_fields(content, option)
    for name, size in content.get("files", {"every file": 1}).items():
        actual_size = size_of(path / name)
        if actual_size != size:
            problem = "is missing" if actual_size is None else f"has {actual_size} bytes of {size}"
            raise UserError(f"{option}: {name} {problem}; use an older checkpoint")
    return content


def _check_fields(content: dict[str, Any], option: str) -> None:
    """Refuse fields of a wrong kind, so that nobody else must expect them."""
    for name, kind in _FIELDS.items():
        if name in _MAY_LACK and name not in content:
            continue
        if not isinstance(value := content.get(name), kind):
            raise UserError(f"{option}: {STATE_FILE} has {name}={value!r}; use an older checkpoint")
    try:
        RunState.of(content["run"])
    except UserError as error:
        raise UserError(f"{option}: {STATE_FILE} {error}") from None
    for name in (*content.get("files", {}), *content.get("crc32", {})):
        if not is_plain_name(name):
            raise UserError(f"{option}: {STATE_FILE} names a file outside: {name}")


def find_checkpoint(path: Path, option: str | None = None) -> Path:
    """Return the checkpoint that `path` means: `path` itself, or the newest whole one in a run's folder.

    Args:
        option: how the user named the path; errors begin with it.

    Raises:
        UserError: `path` is no checkpoint, or is a run's folder without a whole one.
        Unreadable: the file system refuses to read `path`.
    """
    if not is_folder(path / "checkpoints"):
        check(path, option)
        return path
    if checkpoints := complete_checkpoints(path / "checkpoints"):
        return checkpoints[0]
    raise UserError(f"{option or f'run {path}'}: no checkpoint in {path / 'checkpoints'} is whole")


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in the folder, newest first, whole or not, except those set aside.

    Raises:
        Unreadable: the folder cannot be listed. It may hold checkpoints.
    """
    names = [name for name in names_in(folder) if name.startswith("step-") and not Path(name).suffix]
    return [folder / name for name in reversed(names)]


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


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest whole checkpoint in the folder; None if there is none."""
    whole = complete_checkpoints(folder)
    return step_of(whole[0]) if whole else None


def last_good(folder: Path) -> str:
    """Return a clause that names the newest whole checkpoint in the folder, or says that there is none."""
    try:
        whole = complete_checkpoints(folder)
    except Unreadable as error:
        return str(error)
    return f"the last good checkpoint is {whole[0]}" if whole else "there is no checkpoint yet"


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def damaged_file(path: Path, names: Iterable[str], checksums: dict[str, int]) -> str | None:
    """Describe the first file whose bytes are not those that were written. None if every file is intact.

    Raises:
        Unreadable: the file system refuses to read a file, which may be intact.
    """
    for name in names:
        try:
            with reading(path / name):
                actual = checksum(path / name)
        except FileNotFoundError as error:
            return f"{name} cannot be read ({error.strerror})"
        if actual != checksums.get(name):
            return f"{name} does not hold what was written (its checksum differs)"
    return None


def free_name(path: Path) -> Path:
    """Return the path, with a number at its end if the name is taken: another was set aside earlier."""
    names = (path.with_name(f"{path.name}{count or ''}") for count in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
