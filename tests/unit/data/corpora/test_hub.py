"""Hugging Face datasets as a corpus."""

from pathlib import Path

import pytest

from data.corpora.hub import HubCorpus
from dsv2.errors import UserError
from tests.unit.data.corpora.helpers import read


def test_hub_reader_without_files() -> None:
    with pytest.raises(UserError, match="data_files must name them"):
        read(HubCorpus("json"))


def test_hub_source_reads_a_folder(corpus: Path, tmp_path: Path) -> None:
    """The hub itself is out of reach here; the library opens a local folder of data files the same way."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "one"}\n{"body": null}\n{"body": "two"}\n')
    assert read(HubCorpus(str(folder), text_column="body")) == ([("0", "one"), ("2", "two")], [])
    with pytest.raises(UserError, match=r"--text-column text: no such column in .*; it has 'body'"):
        read(HubCorpus(str(folder)))
    with pytest.raises(UserError, match=r"split 'dev'.* cannot be opened: Bad split"):
        read(HubCorpus(str(folder), split="dev"))
