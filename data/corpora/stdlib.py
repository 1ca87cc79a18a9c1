"""The running Python's standard library: about 30 MB of real text on every machine."""

import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data.corpora.base import Corpus, Document, document_name, text_or_reason
from data.reading import files_in


@dataclass(frozen=True)
class StdlibCorpus(Corpus):
    kind = "stdlib"
    summary = "The running Python's standard library, about 30 MB of text."
    out = "prepared/stdlib"
    vocab_size = 4096
    OUTSIDE: ClassVar = frozenset({"site-packages", "dist-packages", "__pycache__"})

    def files(self) -> list[Path]:
        root = self.root()
        paths = (
            path for path in files_in(root, "*.py") if self.OUTSIDE.isdisjoint(path.relative_to(root).parts)
        )
        return sorted(path for path in paths if path.is_file())

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        for path in self.files():
            text, reason = text_or_reason(path)
            name = document_name(path, self.root())
            if reason:  # some of the library's own tests are not UTF-8 on purpose
                skipped.append(name)
            elif text:
                yield name, text

    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files())

    def description(self) -> str:
        return f"standard library of Python {platform.python_version()}"

    @staticmethod
    def root() -> Path:
        return Path(sysconfig.get_path("stdlib"))
