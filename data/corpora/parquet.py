"""Parquet files with the text in one column. Nulls are skipped."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.corpora.base import Document, FileCorpus
from data.hub import text_of


@dataclass(frozen=True)
class ParquetCorpus(FileCorpus):
    kind = "parquet"
    summary = "Parquet files, one document per row."
    pattern = "*.parquet"

    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})

    def read(self, path: Path, name: str, skipped: list[str]) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            self.reject(str(path), f"not a Parquet file: {error}", name, skipped)
            return
        with table:
            names = table.schema_arrow.names
            text_of(dict.fromkeys(names), self.text_column, "--text-column", path)
            row = 0
            for batch in table.iter_batches(columns=[self.text_column]):
                for value in batch.column(0).to_pylist():
                    where = f"row {row} of {path}"
                    text = text_of({self.text_column: value}, self.text_column, "--text-column", where)
                    if text:
                        yield f"{name}:{row}", text
                    row += 1
