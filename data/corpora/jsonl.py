"""JSON lines: every line is an object with the text under `text_key`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.corpora.base import Document, FileCorpus
from data.errors import UserError
from data.hub import text_of


@dataclass(frozen=True)
class JsonlCorpus(FileCorpus):
    kind = "jsonl"
    summary = "JSON lines, one object with text per line."
    pattern = "*.jsonl"

    text_key: str = field(default="text", metadata={"help": "The key of each line's text."})

    def read(self, path: Path, name: str, skipped: list[str]) -> Iterator[Document]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"line {number} of {path}"
                try:
                    row = json.loads(line.decode("utf-8"))
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    text = text_of(row, self.text_key, "--text-key", where)
                    text.encode("utf-8")  # JSON can spell half a surrogate pair, which is not a character
                except UserError:
                    raise
                except ValueError as error:
                    why = str(error) if type(error) is ValueError else f"not JSON in UTF-8 ({error})"
                    self.reject(where, why, f"{name}:{number}", skipped)
                    continue
                if text:
                    yield f"{name}:{number}", text
