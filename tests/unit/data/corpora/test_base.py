"""What holds for every corpus."""

from pathlib import Path

import pytest

from data.corpora.files import FilesCorpus
from data.corpora.hub import HubCorpus
from data.corpora.jsonl import JsonlCorpus
from data.corpora.parquet import ParquetCorpus
from dsv2.errors import UserError
from tests.unit.data.corpora.helpers import read


@pytest.mark.parametrize("kind", [FilesCorpus, JsonlCorpus, ParquetCorpus])
def test_nothing_matches(tmp_path: Path, kind: type) -> None:
    for pattern in (tmp_path / "missing.txt", tmp_path / "*.txt", tmp_path):
        with pytest.raises(UserError, match="no file matches"):
            read(kind((str(pattern),)))


def test_requests_tell_sources_apart() -> None:
    one = FilesCorpus(("a", "b"))
    assert one.request() == {"kind": "files", "paths": ["a", "b"], "document_lines": None}
    assert one.request() == FilesCorpus(("a", "b"), on_bad_file="skip").request()
    assert one.request() != FilesCorpus(("a",)).request()
    assert JsonlCorpus(("a",)).request() != JsonlCorpus(("a",), text_key="body").request()
    assert HubCorpus("x").request()["dataset"] == "x"
