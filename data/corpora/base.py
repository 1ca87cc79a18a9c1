"""The interface of a corpus to prepare, which yields documents in a fixed order; and helpers to read files.

A corpus is a frozen dataclass. Its fields are its arguments on the command line of `python -m data.prepare`,
each with its `help`. `request()` tells one prepared folder from another. A document that cannot be read stops
the run, unless the user chose `--on-bad-file skip`.
"""

import dataclasses
import glob
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.errors import UserError
from data.reading import files_in

Document = tuple[str, str]  # id, text
OnBadFile = Literal["stop", "skip"]


@dataclass(frozen=True)
class Corpus(ABC):
    """Text to prepare. Each subclass is one kind of corpus; kinds.py lists them."""

    kind: ClassVar[str]  # its name on the command line
    summary: ClassVar[str]  # what it reads, for --help
    out: ClassVar[str | None] = None  # the default of --out
    vocab_size: ClassVar[int | None] = None  # the default of --vocab-size
    costly: ClassVar[bool] = False  # too slow to be read again for an error message
    if_too_few: ClassVar[str] = ""  # advice: how to get more documents from the same text

    @abstractmethod
    def documents(self, skipped: list[str]) -> Iterator[Document]:
        """Yield every document that has text; append the ids of unreadable ones to `skipped`."""

    def request(self) -> dict[str, Any]:
        """Return the arguments as JSON-able values. Two equal requests read the same corpus."""
        arguments = json.loads(json.dumps(dataclasses.asdict(self)))
        arguments.pop("on_bad_file", None)  # a run that stopped at a bad file may continue with "skip"
        return {"kind": self.kind, **arguments}

    def total_bytes(self) -> int | None:
        """Return the approximate number of bytes to read, for the progress bar; None if unknown."""
        return None

    def description(self) -> str:
        """Return one line that describes the corpus to people."""
        arguments = [f"{key}={value}" for key, value in self.request().items() if value is not None]
        return " ".join([self.kind, *arguments[1:]])  # the first is the kind


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """A corpus of files on this machine."""

    pattern: ClassVar[str]  # which files of a folder belong to it

    paths: tuple[str, ...] = field(metadata={"help": "Files, folders or quoted globs to read."})
    on_bad_file: OnBadFile = field(
        default="stop",
        metadata={"help": "What to do at a binary or broken document: stop, or skip it and continue."},
    )

    def description(self) -> str:
        hidden = ("kind", "paths")  # they need no name
        others = [f"{key}={v}" for key, v in self.request().items() if v is not None and key not in hidden]
        return " ".join([self.kind, *self.paths, *others])

    @abstractmethod
    def read(self, path: Path, name: str, skipped: list[str]) -> Iterator[Document]:
        """Yield the documents of one file; their ids start with `name`."""

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        for folder, files in matches(self.paths, self.pattern):
            for path in files:
                yield from self.read(path, document_name(path, folder), skipped)

    def total_bytes(self) -> int:
        return sum(path.stat().st_size for _, files in matches(self.paths, self.pattern) for path in files)

    def reject(self, what: str, why: str, name: str, skipped: list[str]) -> None:
        """Stop with a UserError, or remember the document `name` as skipped."""
        if self.on_bad_file == "stop":
            raise UserError(f"{what} is {why}; remove it, or leave such documents out: --on-bad-file skip")
        skipped.append(name)


def matches(patterns: tuple[str, ...], inside: str) -> list[tuple[Path | None, list[Path]]]:
    """Return the sorted files of every path, folder or glob, each list with its folder (None if no folder).

    Document names are relative to the folder. A folder's files are those that match `inside`, at any depth,
    except hidden ones. A file that two patterns match is read once.

    Raises:
        UserError: a pattern matches no file.
        Unreadable: a folder cannot be listed.
    """
    seen: set[Path] = set()
    result = []
    for pattern in patterns:
        path = Path(pattern)
        folder = path if path.is_dir() else None
        if folder:
            files = sorted(files_in(path, inside))
        elif path.is_file():
            files = [path]
        else:
            files = sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [file for file in files if file.is_file()]
        if not files:
            right = f"that folder must hold {inside}" if folder else "must match a file"
            raise UserError(f"paths={pattern}: {right}")
        new = [file for file in files if file.resolve() not in seen]
        seen.update(file.resolve() for file in new)
        result.append((folder, new))
    return result


def document_name(path: Path, folder: Path | None) -> str:
    """Return a document's id, which does not depend on where the corpus folder is."""
    return (path.relative_to(folder) if folder else path).as_posix()


def text_or_reason(path: Path) -> tuple[str, str | None]:
    """Return a file's text and None, or the reason why the file is not text."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 text ({error.reason} at byte {error.start})"
    return text, f"binary: a NUL at byte {raw.index(0)}" if "\0" in text else None
