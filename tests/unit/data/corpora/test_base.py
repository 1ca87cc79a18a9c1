"""What holds for every corpus."""

import os
import re
from pathlib import Path

import pytest

from data.corpora.files import FilesCorpus
from data.corpora.hub import HubCorpus
from data.corpora.jsonl import JsonlCorpus
from data.corpora.parquet import ParquetCorpus
from data.reading import files_in
from dsv2.errors import Unreadable, UserError
from tests.unit.data.corpora.helpers import read


@pytest.mark.parametrize("kind", [FilesCorpus, JsonlCorpus, ParquetCorpus])
def test_nothing_matches(tmp_path: Path, kind: type) -> None:
    for pattern in (tmp_path / "missing.txt", tmp_path / "*.txt"):
        with pytest.raises(UserError, match=re.escape(f"paths={pattern}: must match a file")):
            read(kind((str(pattern),)))
    with pytest.raises(UserError, match=re.escape(f"paths={tmp_path}: that folder must hold {kind.pattern}")):
        read(kind((str(tmp_path),)))


def test_descriptions_have_no_syntax_of_python() -> None:
    assert FilesCorpus(("docs/*.md", "a b.txt")).description() == "files docs/*.md a b.txt"
    assert JsonlCorpus(("a.jsonl",)).description() == "jsonl a.jsonl text_key=text"
    assert HubCorpus("x", subset="en").description().startswith("hub dataset=x subset=en")


@pytest.mark.parametrize("kind", [FilesCorpus, JsonlCorpus, ParquetCorpus])
def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path: Path, kind: type, monkeypatch) -> None:
    """Its documents would be missing from the corpus, and nobody would know."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "text").write_text("text")
    scandir = os.scandir

    def refuse(folder: str | Path):
        if Path(folder).name in ("sub", ".git"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(Unreadable, match=r"/sub: cannot be read \(Permission denied\)"):
        read(kind((str(tmp_path),)))
    (tmp_path / "sub").rmdir()
    assert [path.name for path in files_in(tmp_path, "*")] == ["text"], "hidden folders are left out"


def test_requests_tell_sources_apart() -> None:
    one = FilesCorpus(("a", "b"))
    assert one.request() == {"kind": "files", "paths": ["a", "b"], "document_lines": None}
    assert one.request() == FilesCorpus(("a", "b"), on_bad_file="skip").request()
    assert one.request() != FilesCorpus(("a",)).request()
    assert JsonlCorpus(("a",)).request() != JsonlCorpus(("a",), text_key="body").request()
    assert HubCorpus("x").request()["dataset"] == "x"
