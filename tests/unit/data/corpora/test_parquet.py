"""Parquet files: which documents they give, and what is refused."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpora.parquet import ParquetCorpus
from dsv2.errors import UserError
from tests.unit.data.corpora.helpers import read


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"words": ["one", None, "", "two"], "n": [1, 2, 3, 4]}), tmp_path / "d.parquet")
    source = ParquetCorpus((str(tmp_path),), text_column="words")
    assert read(source) == ([("d.parquet:0", "one"), ("d.parquet:3", "two")], [])
    with pytest.raises(UserError, match=r"--text-column text: no such column in .*; it has 'words', 'n'"):
        read(ParquetCorpus((str(tmp_path),)))
    with pytest.raises(UserError, match=r"--text-column n: that column of .* holds int, not text"):
        read(ParquetCorpus((str(tmp_path),), text_column="n"))
    (tmp_path / "e.parquet").write_bytes(b"PAR0")
    with pytest.raises(UserError, match=r"e\.parquet is not a Parquet file"):
        read(source)
