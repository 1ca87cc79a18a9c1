"""Prepared folders as data sources: validation, and what is refused."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from data.corpora.jsonl import JsonlCorpus
from data.errors import UserError
from data.prepare.corpus import prepare
from data.prepare.settings import Settings
from data.prepared.packing import open_split
from data.streams.folder import LocalSource
from data.streams.sources import check_resumed, source_of
from data.tokenizers.train import train_tokenizer
from tests.unit.data.streams.helpers import (
    LENGTH,
    WORDS,
    build,
    check,
    local,
    streamed,
)


def test_validation_of_a_prepared_folder(folder: Path) -> None:
    config = local(folder)
    packed = open_split(config.path, "validation", LENGTH, 300)
    sequences = source_of(config).validation(config, 300, 3)
    assert sequences.dtype == np.int64
    assert sequences.tolist() == packed.take(np.arange(3)).tolist()
    available = len(packed)
    assert len(source_of(config).validation(config, 300, available)) == available
    with pytest.raises(UserError, match=rf"eval\.sequences={available + 1}: must be at most {available}"):
        source_of(config).validation(config, 300, available + 1)


def test_state_of_another_dataset(folder: Path, tmp_path: Path) -> None:
    state = build(local(folder)).state_dict()
    source = JsonlCorpus((str(folder / "4.jsonl"),))
    settings = Settings(tokenizer=str(folder / "tokenizer.model"), val_fraction=0)
    prepare(source, tmp_path / "other", settings, quiet=True)
    other = local(folder, path=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"other data: data\.dataset was"):
        build(other).load_state_dict(state)
    mine = asdict(local(folder))
    words = f"other data: data.path was {mine['path']!r}, is {other.path!r}, which has other content; set"
    with pytest.raises(UserError, match=re.escape(words)):
        check_resumed(other, state, mine)
    words = f"other data: data.path={other.path} has other content than when the checkpoint was saved; set"
    with pytest.raises(UserError, match=re.escape(words)):
        check_resumed(other, state, asdict(other))


STRANGE = [
    ({"consumed": "3"}, "consumed='3'"),
    ({"consumed": -1}, "consumed=-1"),
    ({"consumed": None}, "consumed=None"),
    ({"fingerprint": [1]}, r"fingerprint=\[1\]"),
    ({"shuffle": 3}, r"the unknown field 'shuffle'; use a newer dsv2"),
]


@pytest.mark.parametrize(("change", "message"), STRANGE)
@pytest.mark.parametrize("config", [local, streamed])
def test_a_state_that_no_stream_has_written(folder: Path, config, change: dict, message: str) -> None:
    stream = build(config(folder))
    with pytest.raises(UserError, match=f"the checkpoint's data has {message}"):
        stream.load_state_dict(stream.state_dict() | change)
    if "fingerprint" in change:
        with pytest.raises(UserError, match=f"the checkpoint's data has {message}"):
            check_resumed(config(folder), change, {})


@pytest.mark.parametrize(
    "lanes", [{}, {"0": 3, "1": 3, "2": 3}, {str(lane): {"remainder": None} for lane in range(3)}]
)
def test_lanes_that_no_stream_has_written(folder: Path, lanes: dict) -> None:
    stream = build(streamed(folder))
    with pytest.raises(UserError, match="the checkpoint's data has no position of lane 0"):
        stream.load_state_dict(stream.state_dict() | {"lanes": lanes})


def test_other_tokenizer_in_the_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "prepared", tmp_path / "copy")
    train_tokenizer(WORDS * 9, 290, tmp_path / "copy" / "tokenizer.model")
    with pytest.raises(UserError, match="is not the tokenizer that"):
        LocalSource().tokenizer(local(folder, path=str(tmp_path / "copy")))


@pytest.mark.parametrize(
    ("changes", "vocab_size", "message"),
    [
        ({"path": "/nowhere"}, 300, "does not exist; make one with: python -m dsv2 prepare"),
        ({"sequence_length": 9999}, 300, r"data\.sequence_length=9999: the train split .* tokens"),
        ({}, 299, r"model\.vocab_size=299: must be at least 300, the pieces of the tokenizer of"),
        (
            {"source": "stdlib", "path": "/nowhere", "vocab_size": 300},
            300,
            "holds no finished preparation; .* Add data=local for a folder of yours, or run: python -m",
        ),
        (
            {"source": "stdlib", "vocab_size": 301, "path": "/nowhere/stdlib"},
            300,
            r"at least 301, the pieces of data\.vocab_size",
        ),
        ({"source": "stdlib", "vocab_size": 301}, 300, "holds jsonl data.* add data=local"),
        (
            {"source": "hf_stream", "dataset": "x", "tokenizer": "missing.model"},
            300,
            "there is no file missing.model",
        ),
    ],
)
def test_check_data_refuses(folder: Path, changes: dict, vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(local(folder, **changes), vocab_size)
