"""A folder of text files."""

from pathlib import Path

import pytest


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
