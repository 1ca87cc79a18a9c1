"""Where text comes from: each source yields (document id, text) in an order that never changes.

A source is a frozen dataclass: its fields are what the user asked for, and (as `request()`) what
tells one prepared folder from another. Documents that cannot be read stop the run, or are skipped
and written to `skipped` where the user asked for that (`on_bad_file="skip"`).
"""

import dataclasses
import glob
import json
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.errors import UserError
from data.hub import open_stream, rows_of, text_of

Document = tuple[str, str]  # id, text
OnBadFile = Literal["stop", "skip"]


@dataclass(frozen=True)
class Source:
    """A corpus. Subclasses give `kind` (its name on the command line) and `documents`."""

    kind: ClassVar[str]

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        """Yield every document with text in it; append the ids of unreadable ones to `skipped`."""
        raise NotImplementedError

    def request(self) -> dict[str, Any]:
        """Return what was asked for, JSON-able: two equal requests read the same corpus."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        fields.pop("on_bad_file", None)  # so that a run that stopped at a bad file can go on with "skip"
        return {"kind": self.kind, **fields}

    def total_bytes(self) -> int | None:
        """Return about how much there is to read, for the progress bar; None if unknown."""
        return None

    def description(self) -> str:
        """Return a line on the corpus for people."""
        given = {key: value for key, value in self.request().items() if key != "kind" and value is not None}
        return f"{self.kind} {' '.join(f'{key}={value}' for key, value in given.items())}"


@dataclass(frozen=True)
class StdlibSource(Source):
    """The running Python's standard library: about 30 MB of real text on every machine."""

    kind = "stdlib"
    OUTSIDE: ClassVar = frozenset({"site-packages", "dist-packages", "__pycache__"})

    def files(self) -> list[Path]:
        root = self.root()
        found = (path for path in root.rglob("*.py") if self.OUTSIDE.isdisjoint(path.relative_to(root).parts))
        return sorted(path for path in found if path.is_file())

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        # Some of the library's own tests are not UTF-8 on purpose: those are always skipped.
        yield from _read_files(self.files(), self.root(), "skip", skipped)

    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files())

    def description(self) -> str:
        return f"standard library of Python {platform.python_version()}"

    @staticmethod
    def root() -> Path:
        return Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True)
class FilesSource(Source):
    """Text files: each one a document, or every `document_lines` lines of it."""

    kind = "files"
    paths: tuple[str, ...]
    on_bad_file: OnBadFile = "stop"
    document_lines: int | None = None

    def __post_init__(self) -> None:
        if self.document_lines is not None and self.document_lines < 1:
            raise UserError(f"--document-lines {self.document_lines} must be at least 1")

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        for root, files in _matches(self.paths, "*"):
            for name, text in _read_files(files, root, self.on_bad_file, skipped):
                yield from self._cut(name, text)

    def _cut(self, name: str, text: str) -> Iterator[Document]:
        if self.document_lines is None:
            yield name, text
            return
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines), self.document_lines):
            yield f"{name}:{start + 1}", "".join(lines[start : start + self.document_lines])

    def total_bytes(self) -> int:
        return _total_bytes(self.paths, "*")


@dataclass(frozen=True)
class JsonlSource(Source):
    """JSON lines: every line an object with the text under `text_key`."""

    kind = "jsonl"
    paths: tuple[str, ...]
    text_key: str = "text"
    on_bad_file: OnBadFile = "stop"

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        for root, files in _matches(self.paths, "*.jsonl"):
            for path in files:
                yield from self._read(path, root, skipped)

    def _read(self, path: Path, root: Path | None, skipped: list[str]) -> Iterator[Document]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                name = f"{_name(path, root)}:{number}"
                try:
                    row = json.loads(line.decode("utf-8"))
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    text = text_of(row, self.text_key, "--text-key", f"line {number} of {path}")
                    text.encode("utf-8")  # JSON can spell half a surrogate pair, which is no character
                except UserError:
                    raise
                except ValueError as error:
                    why = str(error) if type(error) is ValueError else f"not JSON in UTF-8 ({error})"
                    _bad(f"line {number} of {path}", why, name, self.on_bad_file, skipped)
                    continue
                if text:
                    yield name, text

    def total_bytes(self) -> int:
        return _total_bytes(self.paths, "*.jsonl")


@dataclass(frozen=True)
class ParquetSource(Source):
    """Parquet files with the text in one column; nulls are passed over."""

    kind = "parquet"
    paths: tuple[str, ...]
    text_column: str = "text"
    on_bad_file: OnBadFile = "stop"

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        for root, files in _matches(self.paths, "*.parquet"):
            for path in files:
                yield from self._read(path, root, skipped)

    def _read(self, path: Path, root: Path | None, skipped: list[str]) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            _bad(str(path), f"no Parquet file: {error}", _name(path, root), self.on_bad_file, skipped)
            return
        with table:
            names = table.schema_arrow.names
            text_of(dict.fromkeys(names), self.text_column, "--text-column", path)
            row = 0
            for batch in table.iter_batches(columns=[self.text_column]):
                for value in batch.column(0).to_pylist():
                    text = text_of({self.text_column: value}, self.text_column, "--text-column", path)
                    if text:
                        yield f"{_name(path, root)}:{row}", text
                    row += 1


@dataclass(frozen=True)
class HubSource(Source):
    """A Hugging Face dataset, streamed; a document's id is its place in the stream."""

    kind = "hub"
    dataset: str
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        for number, row in enumerate(rows_of(open_stream(self.dataset, self.subset, None, self.split))):
            if text := text_of(row, self.text_column, "--text-column", self.dataset):
                yield str(number), text


def _matches(patterns: tuple[str, ...], inside: str) -> list[tuple[Path | None, list[Path]]]:
    """Return for every path, folder or glob: the folder that names are relative to, and its files, sorted.

    Inside a folder, files that match `inside` count, at any depth, but no hidden ones. A UserError
    names a pattern without any file. A file that two patterns match is read once.
    """
    seen: set[Path] = set()
    result = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            root, files = path, sorted(found for found in path.rglob(inside) if not _hidden(found, path))
        else:
            root = None
            files = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"no file matches {pattern!r}" + (f" ({inside} in that folder)" if root else ""))
        new = [file for file in files if file.resolve() not in seen]
        seen.update(file.resolve() for file in new)
        result.append((root, new))
    return result


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _total_bytes(patterns: tuple[str, ...], inside: str) -> int:
    return sum(path.stat().st_size for _, files in _matches(patterns, inside) for path in files)


def _read_files(
    files: list[Path], root: Path | None, on_bad_file: OnBadFile, skipped: list[str]
) -> Iterator[Document]:
    for path in files:
        name = _name(path, root)
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            why = f"not UTF-8 text ({error.reason} at byte {error.start})"
            _bad(str(path), why, name, on_bad_file, skipped)
            continue
        if "\0" in text:
            _bad(str(path), f"binary: a NUL at byte {raw.index(0)}", name, on_bad_file, skipped)
        elif text:
            yield name, text


def _name(path: Path, root: Path | None) -> str:
    """Return a document's name, the same wherever the corpus folder `root` lies."""
    return (path.relative_to(root) if root else path).as_posix()


def _bad(what: str, why: str, name: str, on_bad_file: OnBadFile, skipped: list[str]) -> None:
    if on_bad_file == "stop":
        raise UserError(f"{what} is {why}; remove it, or pass --on-bad-file skip to leave such documents out")
    skipped.append(name)
