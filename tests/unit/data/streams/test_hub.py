"""Streamed datasets as a data source: validation, and what is refused."""

import json
import shutil
import zlib
from pathlib import Path

import pytest

from data.errors import UserError
from data.streams.sources import source_of
from tests.unit.data.streams.helpers import (
    FILES,
    LENGTH,
    WINDOW,
    build,
    check,
    stream_order,
    streamed,
)


def test_held_out_documents_never_train(tmp_path: Path, folder: Path) -> None:
    """Without a validation split, documents chosen by their text validate: one in a hundred, in no lane."""
    texts = [f"document number {k} end" for k in range(600)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = streamed(folder, data_files=[str(path)], lanes=1, shuffle_window=1)
    tokenizer = source_of(config).tokenizer(config)

    def documents(sequences: list[list[int]]) -> set[str]:
        """The whole documents in neighbouring sequences."""
        text = tokenizer.decode([i for row in sequences for i in row[:-1]])
        return {part + " end" for part in text.split(" end")[:-1]}

    held = {text for text in texts if zlib.crc32(text.encode()) % 100 == 0}
    assert 3 <= len(held) <= 12
    n = sum(len(tokenizer.encode(text)) + 2 for text in texts) // LENGTH
    assert documents(stream_order(build(config), n + 1)) == set(texts) - held
    available = (sum(len(tokenizer.encode(text)) + 2 for text in held) - 1) // LENGTH
    validation = documents(source_of(config).validation(config, 300, available).tolist())
    assert validation <= held
    assert len(validation) >= len(held) - 2  # the last one or two are cut
    with pytest.raises(UserError, match=rf"must be at most {available}"):
        source_of(config).validation(config, 300, available + 1)
    assert documents(
        stream_order(
            build(streamed(folder, data_files=[str(path)], lanes=1, shuffle_window=1, val_split="other")),
            n + 1,
        )
    ) == set(texts)


def test_validation_of_a_stream(tmp_path: Path, folder: Path) -> None:
    """A split of its own, in the order of its documents, without a shuffle."""
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    texts = {"train": ["alpha beta"], "validation": ["gamma delta", "epsilon zeta eta", "theta"] * 9}
    for split, rows in texts.items():
        (dataset / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = streamed(folder, dataset=str(dataset), data_files=None, val_split="validation", lanes=1)
    tokenizer = source_of(config).tokenizer(config)
    tokens = [i for text in texts["validation"] for i in [1, *tokenizer.encode(text), 2]]
    available = (len(tokens) - 1) // LENGTH
    sequences = source_of(config).validation(config, 300, available)
    assert sequences.tolist() == [tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(available)]
    with pytest.raises(UserError, match=rf"eval\.sequences={available + 1}: must be at most {available}"):
        source_of(config).validation(config, 300, available + 1)
    train = [1, *tokenizer.encode("alpha beta"), 2] * LENGTH
    first = stream_order(build(config), WINDOW)
    assert sorted(first) == sorted(train[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(WINDOW))


def test_check_data_compares_the_streams_tokenizer(folder: Path) -> None:
    with pytest.raises(UserError, match=r"at least 300, the pieces of data\.tokenizer"):
        check(streamed(folder), 299)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 6}, rf"data\.lanes=6: must be at most {FILES}, the files of json"),
        ({"split": "dev", "val_split": "dev"}, r"split 'dev'.* cannot be opened: Bad split"),
        ({"data_files": ["/nowhere/none.jsonl"]}, "cannot be opened: Unable to find"),
        ({"data_files": None}, r"data\.dataset=json: reads files; data_files must name them"),
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
        check(streamed(folder, **changes), 300)


def test_a_validation_split_that_is_there(folder: Path, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation")):
        shutil.copy(folder / f"{number}.jsonl", tmp_path / f"{split}.jsonl")
    here = {"dataset": str(tmp_path), "data_files": None, "lanes": 1}
    check(streamed(folder, **here, val_split="validation"), 300)
    with pytest.raises(UserError, match=r"data\.val_split=test: .*cannot be opened: Bad split"):
        check(streamed(folder, **here, val_split="test"), 300)


def test_a_folder_with_a_loading_script_is_one_message_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    hub = tmp_path / "corpus"
    hub.mkdir()
    (hub / "corpus.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = streamed(folder, dataset=str(hub), data_files=None)
    with pytest.raises(UserError) as refusal:
        check(config, 300)
    assert str(refusal.value).startswith(f"data.dataset={hub}: split 'train' ")
    assert "cannot be opened: Dataset scripts are no longer supported" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:The Pandas builder is deprecated")
def test_a_pickle_is_one_message_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    import os
    import pickle

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Command()))
    config = streamed(folder, dataset="pandas", data_files=[str(tmp_path / "rows.pkl")], lanes=1)
    with pytest.raises(UserError, match=r"data.dataset=pandas: .*pickle") as refusal:
        check(config, 300)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "marker").exists()


def test_streams_that_cannot_be(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"data\.lanes=6: must be at most {FILES}"):
        build(streamed(folder, lanes=6))
    with pytest.raises(UserError, match=r"split 'dev'.* cannot be opened: Bad split"):
        build(streamed(folder, split="dev"))
    with pytest.raises(UserError, match=r"data\.text_column=body: no such column in json; it has 'text', 'o"):
        build(streamed(folder, text_column="body")).take(1, 0, 1)
    with pytest.raises(UserError, match=r"data\.text_column=other: that column of json holds int, not text"):
        build(streamed(folder, text_column="other")).take(1, 0, 1)
