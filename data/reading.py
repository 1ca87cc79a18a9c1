"""Read files and folders so that "unreadable" is never taken for "missing".

A file system may refuse a read for a while: EIO, EACCES, or ESTALE after a server's restart. A program that
takes this for a missing file starts afresh, over what the file says. Every function here raises `Unreadable`
instead. Missing is only what the file system says is missing.
"""

import fnmatch
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.errors import Unreadable


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a failed read of `path` into `Unreadable`; a missing file stays FileNotFoundError.

    Raises:
        FileNotFoundError: there is no such file or folder.
        Unreadable: the file system refused; the message names the path and the reason.
    """
    try:
        yield
    except NotADirectoryError as error:  # a parent of the path is a file
        raise FileNotFoundError(*error.args) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(
            f"{path}: cannot be read ({error.strerror or error}); correct the cause and run the same command "
            "again"
        ) from error


def _status(path: Path) -> os.stat_result | None:
    try:
        with reading(path):
            return os.stat(path)
    except FileNotFoundError:
        return None


def is_file(path: Path) -> bool:
    """Return whether `path` is a file."""
    status = _status(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder."""
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def size_of(path: Path) -> int | None:
    """Return a file's size in bytes; None if there is no such file."""
    status = _status(path)
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None


def names_in(folder: Path) -> list[str]:
    """Return the sorted names of everything in the folder; [] if there is no such folder."""
    try:
        with reading(folder), os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries)
    except FileNotFoundError:
        return []


def files_in(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield the files in a folder, at any depth, whose names match; hidden files and folders are left out.

    Raises:
        Unreadable: a folder cannot be listed. It may hold such files.
    """

    def refuse(error: OSError) -> None:
        with reading(Path(error.filename)):
            raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in fnmatch.filter(names, pattern):
            if not name.startswith("."):
                yield Path(parent) / name


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the content is not UTF-8.
    """
    with reading(path):
        return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the content is not JSON, or is nested too deeply.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_plain_name(name: object) -> bool:
    """Return whether a name that a file gives stays in that file's own folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
