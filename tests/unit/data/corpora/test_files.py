"""Text files: which documents they give, in which order, and what is refused."""

from pathlib import Path

import pytest

from data.corpora.files import FilesCorpus
from dsv2.errors import UserError
from tests.unit.data.corpora.helpers import FILES, read


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
