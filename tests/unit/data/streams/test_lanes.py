"""The stream of lanes, against a slow one; and what ends it."""

import json
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import UserError
from data.streams.lanes import LaneStream
from data.tokenizers.load import load_tokenizer
from tests.unit.data.streams.helpers import (
    COUNT,
    FILES,
    LANES,
    LENGTH,
    WINDOW,
    WORDS,
    build,
    check,
    stream_order,
    streamed,
    texts_of,
)


def lane_order(config: DataConfig, folder: Path, count: int) -> list[list[int]]:
    """The first `count` sequences, computed slowly: whole epochs of tokens, then cut, then shuffled."""
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    files_of = np.array_split(np.arange(FILES), LANES)  # contiguous, as IterableDataset.shard does
    lanes = []
    for lane, files in enumerate(files_of):
        texts = [text for number in files for text in texts_of(folder, number) if text]
        tokens = [i for text in texts for i in [1, *tokenizer.encode(text), 2]]
        per_lane = -(-count // (LANES * WINDOW)) * WINDOW
        tokens = tokens * (per_lane * LENGTH // len(tokens) + 2)
        cut = [tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(per_lane)]
        shuffled = []
        for window in range(per_lane // WINDOW):
            order = np.random.default_rng([config.seed, lane, window]).permutation(WINDOW)
            shuffled += [cut[window * WINDOW + i] for i in order]
        lanes.append(shuffled)
    return [lanes[g % LANES][g // LANES] for g in range(count)]


def test_lane_stream_against_a_slow_one(folder: Path) -> None:
    config = streamed(folder, split="train", val_split="other")  # nothing is held out
    stream = build(config)
    assert isinstance(stream, LaneStream)
    assert stream_order(stream, COUNT) == lane_order(config, folder, COUNT)
    epochs = [state["epoch"] for state in stream.state_dict()["lanes"].values()]
    assert min(epochs) >= 1  # every lane went round


def test_resume_inside_a_long_document(folder: Path, tmp_path: Path) -> None:
    """Windows that need no new document: the library's state is zero until it has read one."""
    path = tmp_path / "long.jsonl"
    texts = ["alpha", " ".join(WORDS * 60), "omega", " ".join(WORDS * 40), "end"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = streamed(folder, data_files=[str(path)], lanes=1, shuffle_window=3)
    expected = stream_order(build(config), 120)
    stream = build(config)
    remainders = []
    for place in range(0, 110, 5):
        resumed = build(config)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert stream_order(resumed, 5) == expected[place : place + 5]
        remainders.append(len(resumed.state_dict()["lanes"]["0"]["remainder"]))
        stream = resumed
    assert max(remainders) > 2 * 3 * LENGTH


def test_stream_without_text_ends(folder: Path, tmp_path: Path) -> None:
    """An epoch without a token is an error of this rank, not an endless loop."""
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": null}\n')
    stream = build(streamed(folder, data_files=[str(path)], lanes=1))
    with pytest.raises(UserError, match=r"data\.dataset=json: lane 0 holds no text"):
        stream.take(1, 0, 1)


def test_a_line_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    """Whether the first look meets it or training does."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "good"}\n{"text": broken\n')
    with pytest.raises(UserError, match=r"data\.dataset=json: cannot be read after 0 rows \(.*JSON"):
        check(streamed(folder, data_files=[str(broken)], lanes=1), 300)
    files = [str(folder / "0.jsonl"), str(broken)]
    check(streamed(folder, data_files=files, lanes=1), 300)
    with pytest.raises(UserError, match=r"lane 0: cannot be read after \d+ rows \(.*JSON"):
        build(streamed(folder, data_files=files, lanes=1)).take(100, 0, 1)


def test_parquet_streams_resume_too(folder: Path, tmp_path: Path) -> None:
    """Another reader of the library, whose state looks different, and row groups to stop inside of."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = []
    for number in range(FILES):
        names.append(str(tmp_path / f"{number}.parquet"))
        pq.write_table(pa.table({"text": texts_of(folder, number)}), names[-1], row_group_size=3)
    config = streamed(folder, dataset="parquet", data_files=names)
    expected = stream_order(build(streamed(folder)), 90)
    assert stream_order(build(config), 90) == expected  # same documents, same order
    stream = build(config)
    for start, end in pairwise(accumulate([0, 5, 1, 1, 13, 30, 20])):
        resumed = build(config)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert stream_order(resumed, end - start) == expected[start:end]
        stream = resumed
