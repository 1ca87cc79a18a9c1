"""Text files: each file is one document, or several of `document_lines` lines."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.corpora.base import Document, FileCorpus, text_or_reason
from data.errors import UserError


@dataclass(frozen=True)
class FilesCorpus(FileCorpus):
    kind = "files"
    summary = "Text files."
    pattern = "*"
    if_too_few = "--document-lines N cuts files into several"

    document_lines: int | None = field(
        default=None,
        metadata={
            "help": "Cut each file into documents of this many lines; without it, a file is one document."
        },
    )

    def __post_init__(self) -> None:
        if self.document_lines is not None and self.document_lines < 1:
            raise UserError(f"--document-lines {self.document_lines}: must be at least 1")

    def read(self, path: Path, name: str, skipped: list[str]) -> Iterator[Document]:
        text, reason = text_or_reason(path)
        if reason:
            self.reject(str(path), reason, name, skipped)
        elif text and self.document_lines is None:
            yield name, text
        elif text and self.document_lines:
            lines = text.splitlines(keepends=True)
            for start in range(0, len(lines), self.document_lines):
                yield f"{name}:{start + 1}", "".join(lines[start : start + self.document_lines])
