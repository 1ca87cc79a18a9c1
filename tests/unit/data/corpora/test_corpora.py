"""Sources: which documents they yield, in which order, and what they refuse."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpora.base import Corpus
from data.corpora.files import FilesCorpus
from data.corpora.hub import HubCorpus
from data.corpora.jsonl import JsonlCorpus
from data.corpora.parquet import ParquetCorpus
from data.corpora.stdlib import StdlibCorpus
from dsv2.errors import UserError


def read(source: Corpus) -> tuple[list[tuple[str, str]], list[str]]:
    skipped: list[str] = []
    return list(source.documents(skipped)), skipped


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_bytes("zwei\r\nlines é\n".encode())
    (folder / "a.md").write_text("one\n")
    (folder / "empty.txt").write_text("")
    (folder / "sub" / "c.txt").write_text("three\nfour\nfive\n")
    (folder / ".git" / "index").write_bytes(b"\0\0")
    (folder / ".hidden").write_bytes(b"\xff")
    return folder


FILES = [("a.md", "one\n"), ("b.txt", "zwei\r\nlines é\n"), ("sub/c.txt", "three\nfour\nfive\n")]


def test_files_of_a_folder(corpus: Path) -> None:
    source = FilesCorpus((str(corpus),))
    assert read(source) == (FILES, [])
    assert source.total_bytes() == sum(len(text.encode()) for _, text in FILES)


def test_files_by_glob_and_name_are_read_once(corpus: Path) -> None:
    names = (f"{corpus}/**/*.txt", str(corpus / "b.txt"), str(corpus))
    documents, _ = read(FilesCorpus(names))
    assert documents == [
        (str(corpus / "b.txt"), FILES[1][1]),
        (str(corpus / "sub" / "c.txt"), FILES[2][1]),
        ("a.md", "one\n"),
    ]


def test_files_cut_into_documents(corpus: Path) -> None:
    documents, _ = read(FilesCorpus((str(corpus / "sub"),), document_lines=2))
    assert documents == [("c.txt:1", "three\nfour\n"), ("c.txt:3", "five\n")]


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"text\0more", "binary: a NUL at byte 4"), (b"ab\xffc", r"not UTF-8 text .* at byte 2")],
)
def test_binary_file(corpus: Path, content: bytes, why: str) -> None:
    bad = corpus / "aa.bin"
    bad.write_bytes(content)
    with pytest.raises(UserError, match=rf"aa\.bin is {why}.*--on-bad-file skip"):
        read(FilesCorpus((str(corpus),)))
    assert read(FilesCorpus((str(corpus),), on_bad_file="skip")) == (FILES, ["aa.bin"])


@pytest.mark.parametrize("kind", [FilesCorpus, JsonlCorpus, ParquetCorpus])
def test_nothing_matches(tmp_path: Path, kind: type) -> None:
    for pattern in (tmp_path / "missing.txt", tmp_path / "*.txt", tmp_path):
        with pytest.raises(UserError, match="no file matches"):
            read(kind((str(pattern),)))


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


def test_stdlib() -> None:
    source = StdlibCorpus()
    files = source.files()
    names = [path.relative_to(source.root()).as_posix() for path in files]
    assert names == [path.relative_to(source.root()).as_posix() for path in sorted(files)]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name]
    documents = source.documents([])
    name, text = next(documents)
    assert (source.root() / name).read_bytes().decode() == text
    assert "Python 3" in source.description()


def test_requests_tell_sources_apart() -> None:
    one = FilesCorpus(("a", "b"))
    assert one.request() == {"kind": "files", "paths": ["a", "b"], "document_lines": None}
    assert one.request() == FilesCorpus(("a", "b"), on_bad_file="skip").request()
    assert one.request() != FilesCorpus(("a",)).request()
    assert JsonlCorpus(("a",)).request() != JsonlCorpus(("a",), text_key="body").request()
    assert HubCorpus("x").request()["dataset"] == "x"


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
