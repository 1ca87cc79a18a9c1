"""What goes with the data, and what is refused before a run starts or when its stream is opened."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data.config import DataSource
from data.streams.stream import check_data, token_bytes_of, tokenizer_of, unigram_nats_of
from data.tokenizers.base import load_tokenizer, train_tokenizer
from dsv2.errors import OneRankError, UserError
from tests.unit.data.test_streams import FILES, WORDS, build, local, streamed, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("check"))


def test_what_goes_with_the_data(folder: Path) -> None:
    for config in (local(folder), streamed(folder)):
        tokenizer = tokenizer_of(config)
        assert tokenizer.sha256 == load_tokenizer(folder / "tokenizer.model").sha256
        np.testing.assert_array_equal(token_bytes_of(config), tokenizer.token_bytes())
    assert unigram_nats_of(streamed(folder)) is None
    unigram = unigram_nats_of(local(folder))
    assert unigram is not None
    assert 1 < unigram < np.log(300)


def test_other_tokenizer_in_the_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "prepared", tmp_path / "copy")
    train_tokenizer(WORDS * 9, 290, tmp_path / "copy" / "tokenizer.model")
    with pytest.raises(UserError, match="is not the tokenizer that"):
        tokenizer_of(local(folder, path=str(tmp_path / "copy")))


def test_check_data_accepts(folder: Path) -> None:
    check_data(local(folder), 300)
    check_data(streamed(folder), 300)


@pytest.mark.parametrize(
    ("changes", "vocab_size", "message"),
    [
        ({"path": "/nowhere"}, 300, "does not exist; make one with: python -m data.prepare"),
        ({"sequence_length": 9999}, 300, r"data\.sequence_length=9999: the train split .* tokens"),
        ({}, 299, r"model\.vocab_size=299 must be at least 300, the pieces of the tokenizer of"),
        (
            {"source": DataSource.stdlib, "vocab_size": 301, "path": "/nowhere"},
            300,
            r"at least 301, the pieces of data\.vocab_size",
        ),
        ({"source": DataSource.stdlib, "vocab_size": 301}, 300, "holds jsonl of your own.* add data=local"),
        (
            {"source": DataSource.hf_stream, "dataset": "x", "tokenizer": "missing.model"},
            300,
            "there is no file missing.model",
        ),
    ],
)
def test_check_data_refuses(folder: Path, changes: dict, vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_data(local(folder, **changes), vocab_size)


def test_check_data_compares_the_streams_tokenizer(folder: Path) -> None:
    with pytest.raises(UserError, match=r"at least 300, the pieces of data\.tokenizer"):
        check_data(streamed(folder), 299)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 6}, rf"data\.lanes=6 must be at most {FILES}, the files of json"),
        ({"split": "dev", "val_split": "dev"}, r"split 'dev'.* cannot be opened: Bad split"),
        ({"data_files": ["/nowhere/none.jsonl"]}, "cannot be opened: Unable to find"),
        ({"data_files": None}, "dataset 'json' reads files: data_files must name them"),
        ({"text_column": "body"}, r"data\.text_column=body: no such column in json"),
        ({"text_column": "other"}, r"data\.text_column=other: that column of json holds int, not text"),
        (
            {"val_split": "validation"},
            r"data\.val_split=validation: .* cannot be opened: Bad split.*data\.val_split=train holds out",
        ),
    ],
)
def test_mistakes_in_a_stream_are_found_before_it_is_built(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_data(streamed(folder, **changes), 300)


def test_a_validation_split_that_is_there(folder: Path, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation")):
        shutil.copy(folder / f"{number}.jsonl", tmp_path / f"{split}.jsonl")
    here = {"dataset": str(tmp_path), "data_files": None, "lanes": 1}
    check_data(streamed(folder, **here, val_split="validation"), 300)
    with pytest.raises(UserError, match=r"data\.val_split=test: .*cannot be opened: Bad split"):
        check_data(streamed(folder, **here, val_split="test"), 300)


def test_a_line_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    """Whether the first look meets it or training does."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "good"}\n{"text": broken\n')
    with pytest.raises(UserError, match=r"the dataset holds what cannot be read: .*JSON"):
        check_data(streamed(folder, data_files=[str(broken)], lanes=1), 300)
    files = [str(folder / "0.jsonl"), str(broken)]
    check_data(streamed(folder, data_files=files, lanes=1), 300)
    with pytest.raises(OneRankError, match="the dataset holds what cannot be read"):
        build(streamed(folder, data_files=files, lanes=1)).take(100, 0, 1)


def test_streams_that_cannot_be(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"data\.lanes=6 must be at most {FILES}"):
        build(streamed(folder, lanes=6))
    with pytest.raises(UserError, match=r"split 'dev'.* cannot be opened: Bad split"):
        build(streamed(folder, split="dev"))
    with pytest.raises(UserError, match=r"data\.text_column=body: no such column in json; it has 'text', 'o"):
        build(streamed(folder, text_column="body")).take(1, 0, 1)
    with pytest.raises(UserError, match=r"data\.text_column=other: that column of json holds int, not text"):
        build(streamed(folder, text_column="other")).take(1, 0, 1)
