"""JSON lines: which documents they give, and what is refused."""

import json
from pathlib import Path

import pytest

from data.corpora.jsonl import JsonlCorpus
from dsv2.errors import UserError
from tests.unit.data.corpora.helpers import read


def test_jsonl(tmp_path: Path) -> None:
    lines = [{"body": "one"}, {"body": ""}, {"body": None}, {"body": "vier\n", "x": 1}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    expected = [("d.jsonl:1", "one"), ("d.jsonl:7", "vier\n")]
    assert read(JsonlCorpus((str(tmp_path),), text_key="body")) == (expected, [])
    with pytest.raises(UserError, match=r"--text-key text: no such column in line 1 .*; it has 'body'"):
        read(JsonlCorpus((str(path),)))


@pytest.mark.parametrize("line", [b"{oops", b"[1]", b'{"text": "\xff"}', b'{"text": "half \\ud800"}'])
def test_broken_jsonl(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(UserError, match=r"line 2 of .*d\.jsonl is .*--on-bad-file skip"):
        read(JsonlCorpus((str(path),)))
    documents, skipped = read(JsonlCorpus((str(path),), on_bad_file="skip"))
    assert [text for _, text in documents] == ["one", "two"]
    assert skipped == [f"{path}:2"]


def test_jsonl_with_numbers_for_text(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(UserError, match=r"--text-key text: that column of line 1 .* holds int, not text"):
        read(JsonlCorpus((str(tmp_path),), on_bad_file="skip"))
