"""Streams: one global order of sequences, whatever the shares, stops and resumes."""

import json
import re
import zlib
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import DataConfig, DataSource
from data.corpora.base import JsonlSource
from data.prepare.command import Settings, prepare
from data.prepared.packing import PackedTokens
from data.streams.stream import (
    Batch,
    LaneStream,
    MapStream,
    Stream,
    build_stream,
    check_resumed,
    tokenizer_of,
    validation_sequences,
)
from data.tokenizers.base import load_tokenizer, train_tokenizer
from dsv2.errors import UserError
from dsv2.parallel.mesh import ALONE

LENGTH, LANES, WINDOW, SEED = 20, 3, 4, 5
FILES = 5  # more than lanes: some lanes read two
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("stream"))


def write_folder(folder: Path) -> Path:
    """Write five small files of JSON lines (with empty documents), a tokenizer, a prepared folder."""
    rng = np.random.default_rng(1)
    for number in range(FILES):
        texts = [" ".join(rng.choice(WORDS, rng.integers(3, 30))) for _ in range(4 + 2 * number)]
        texts[1] = ""
        rows = [json.dumps({"text": text, "other": 1}) + "\n" for text in texts]
        (folder / f"{number}.jsonl").write_text("".join(rows))
    texts = [text for number in range(FILES) for text in texts_of(folder, number)]
    train_tokenizer(texts, 300, folder / "tokenizer.model")
    settings = Settings(tokenizer=str(folder / "tokenizer.model"), val_fraction=0.2)
    prepare(JsonlSource((f"{folder}/*.jsonl",)), folder / "prepared", settings, quiet=True)
    return folder


def texts_of(folder: Path, number: int) -> list[str]:
    lines = (folder / f"{number}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def local(folder: Path, **changes) -> DataConfig:
    path = str(folder / "prepared")
    return DataConfig(
        **{"source": DataSource.local, "path": path, "sequence_length": LENGTH, "seed": SEED} | changes
    )


def streamed(folder: Path, **changes) -> DataConfig:
    given = {
        "source": DataSource.hf_stream,
        "dataset": "json",
        "data_files": [str(folder / f"{number}.jsonl") for number in range(FILES)],
        "val_split": "train",
        "tokenizer": str(folder / "tokenizer.model"),
        "lanes": LANES,
        "shuffle_window": WINDOW,
        "sequence_length": LENGTH,
        "seed": SEED,
    }
    return DataConfig(**given | changes)


def build(config: DataConfig) -> Stream:
    return build_stream(config, 300, ALONE)


def sequences_of(batch: Batch) -> list[list[int]]:
    """The S + 1 tokens of each sequence, after a look at the batch itself."""
    assert batch.input_ids.dtype == batch.labels.dtype == batch.sequence_ids.dtype == torch.int64
    assert batch.input_ids.shape == batch.labels.shape == (len(batch.sequence_ids), LENGTH)
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    return torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1).tolist()


def stream_order(stream: Stream, count: int) -> list[list[int]]:
    return sequences_of(stream.take(count, 0, count))


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


@pytest.fixture(params=["map", "lanes"])
def config(request: pytest.FixtureRequest, folder: Path) -> DataConfig:
    return local(folder) if request.param == "map" else streamed(folder)


def comparable(state: dict) -> dict:
    """A state without the library's own part, which counts from where it was last loaded."""
    lanes = {name: lane | {"dataset": None} for name, lane in state.get("lanes", {}).items()}
    return state | {"lanes": lanes}


COUNT = 130  # sequences: more than two epochs of either stream


def test_map_stream_epochs(folder: Path) -> None:
    """Every epoch has each sequence once, in an order of its own."""
    packed = PackedTokens(folder / "prepared", "train", LENGTH, 300)
    n = len(packed)
    assert 2 * n < COUNT
    order = stream_order(build(local(folder)), 3 * n)
    epochs = [order[epoch * n : (epoch + 1) * n] for epoch in range(3)]
    everything = sorted(packed.take(np.arange(n)).tolist())
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert stream_order(build(local(folder, seed=SEED + 1)), n) != epochs[0]


def test_lane_stream_against_a_slow_one(folder: Path) -> None:
    config = streamed(folder, split="train", val_split="other")  # nothing is held out
    stream = build(config)
    assert isinstance(stream, LaneStream)
    assert stream_order(stream, COUNT) == lane_order(config, folder, COUNT)
    epochs = [state["epoch"] for state in stream.state_dict()["lanes"].values()]
    assert min(epochs) >= 1  # every lane went round


@pytest.mark.parametrize("step", [1, 3, 7, 10])
def test_shares_and_steps_change_nothing(config: DataConfig, step: int) -> None:
    """Any division of the order into takes, and of each take into shares, gives the same sequences."""
    expected = stream_order(build(config), COUNT)
    streams = [build(config) for _ in range(2)]
    got: list[list[int]] = []
    ids: list[int] = []
    for total in [step] * (COUNT // step):
        cut = total // 3
        for stream, start, count in zip(streams, (0, cut), (cut, total - cut), strict=True):
            batch = stream.take(total, start, count)
            got += sequences_of(batch)
            ids += batch.sequence_ids.tolist()
        assert [stream.consumed for stream in streams] == [len(ids)] * 2
    assert ids == list(range(len(ids)))
    assert got == expected[: len(got)]


def test_resume_at_every_point(config: DataConfig) -> None:
    """Save, load into a fresh stream, save again at once, load that and go on: inside and between windows."""
    expected = stream_order(build(config), COUNT)
    stream = build(config)
    for place in range(2 * LANES * WINDOW + 2):
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = build(config)
        resumed.load_state_dict(state)
        assert resumed.consumed == place
        assert json.loads(json.dumps(resumed.state_dict())) == state
        again = build(config)
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        batch = again.take(20, 0, 20)
        assert sequences_of(batch) == expected[place : place + 20]
        assert batch.sequence_ids.tolist() == list(range(place, place + 20)), "so who is exempt"
        stream.take(1, 0, 0)  # advances without handing anything out


def test_chain_of_resumes(config: DataConfig) -> None:
    """Resumes on resumes, across the ends of windows and epochs; the last state is that of one long run."""
    expected = stream_order(build(config), COUNT)
    whole = build(config)
    stream = build(config)
    for start, end in pairwise([0, 1, 2, 13, 14, 50, 77, 78, COUNT]):
        resumed = build(config)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert stream_order(resumed, end - start) == expected[start:end]
        stream = resumed
    whole.take(COUNT, 0, 0)
    assert comparable(stream.state_dict()) == comparable(whole.state_dict())


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


def test_loading_turns_a_used_stream_back(config: DataConfig) -> None:
    expected = stream_order(build(config), 40)
    stream = build(config)
    stream.take(7, 0, 7)
    state = stream.state_dict()
    assert stream_order(stream, 33) == expected[7:40]
    stream.load_state_dict(state)
    assert stream_order(stream, 33) == expected[7:40]


OTHER = {"seed": 6, "sequence_length": 11, "lanes": 2, "shuffle_window": 5, "split": "x", "text_column": "x"}


@pytest.mark.parametrize(
    ("make", "field"),
    [(local, "seed"), (local, "sequence_length"), *((streamed, field) for field in OTHER)],
)
def test_state_of_other_data(folder: Path, make: Callable[..., DataConfig], field: str) -> None:
    """Found by the stream, and before there is one."""
    config = make(folder)
    stream = build(config)
    state = stream.state_dict()
    check_resumed(config, state)
    state["fingerprint"] = {**state["fingerprint"], field: OTHER[field]}
    was, now = re.escape(repr(OTHER[field])), re.escape(repr(getattr(config, field)))
    for find in (stream.load_state_dict, partial(check_resumed, config)):
        with pytest.raises(UserError, match=rf"other data: data\.{field} was {was}, is {now};"):
            find(state)


def test_state_of_another_dataset(folder: Path, tmp_path: Path) -> None:
    state = build(local(folder)).state_dict()
    source = JsonlSource((str(folder / "4.jsonl"),))
    settings = Settings(tokenizer=str(folder / "tokenizer.model"), val_fraction=0)
    prepare(source, tmp_path / "other", settings, quiet=True)
    other = local(folder, path=str(tmp_path / "other"))
    for find in (build(other).load_state_dict, partial(check_resumed, other)):
        with pytest.raises(UserError, match=r"other data: data\.dataset was"):
            find(state)


@pytest.mark.parametrize(("total", "start", "count"), [(4, 3, 2), (4, -1, 2), (4, 0, -1)])
def test_share_outside_the_step(config: DataConfig, total: int, start: int, count: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        build(config).take(total, start, count)


def test_held_out_documents_never_train(tmp_path: Path, folder: Path) -> None:
    """Without a validation split, documents chosen by their text validate: one in a hundred, in no lane."""
    texts = [f"document number {k} end" for k in range(600)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = streamed(folder, data_files=[str(path)], lanes=1, shuffle_window=1)
    tokenizer = tokenizer_of(config)

    def documents(sequences: list[list[int]]) -> set[str]:
        """The whole documents in neighbouring sequences."""
        text = tokenizer.decode([i for row in sequences for i in row[:-1]])
        return {part + " end" for part in text.split(" end")[:-1]}

    held = {text for text in texts if zlib.crc32(text.encode()) % 100 == 0}
    assert 3 <= len(held) <= 12
    n = sum(len(tokenizer.encode(text)) + 2 for text in texts) // LENGTH
    assert documents(stream_order(build(config), n + 1)) == set(texts) - held
    available = (sum(len(tokenizer.encode(text)) + 2 for text in held) - 1) // LENGTH
    validation = documents(validation_sequences(config, 300, available).tolist())
    assert validation <= held
    assert len(validation) >= len(held) - 2  # the last one or two are cut
    with pytest.raises(UserError, match=rf"must be at most {available}"):
        validation_sequences(config, 300, available + 1)
    assert documents(
        stream_order(
            build(streamed(folder, data_files=[str(path)], lanes=1, shuffle_window=1, val_split="other")),
            n + 1,
        )
    ) == set(texts)


def test_validation_of_a_prepared_folder(folder: Path) -> None:
    config = local(folder)
    packed = PackedTokens(config.path, "validation", LENGTH, 300)
    sequences = validation_sequences(config, 300, 3)
    assert sequences.dtype == np.int64
    assert sequences.tolist() == packed.take(np.arange(3)).tolist()
    available = len(packed)
    assert len(validation_sequences(config, 300, available)) == available
    with pytest.raises(UserError, match=rf"eval\.sequences={available + 1} must be at most {available}"):
        validation_sequences(config, 300, available + 1)


def test_validation_of_a_stream(tmp_path: Path, folder: Path) -> None:
    """A split of its own, in the order of its documents, without a shuffle."""
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    texts = {"train": ["alpha beta"], "validation": ["gamma delta", "epsilon zeta eta", "theta"] * 9}
    for split, rows in texts.items():
        (dataset / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = streamed(folder, dataset=str(dataset), data_files=None, val_split="validation", lanes=1)
    tokenizer = tokenizer_of(config)
    tokens = [i for text in texts["validation"] for i in [1, *tokenizer.encode(text), 2]]
    available = (len(tokens) - 1) // LENGTH
    sequences = validation_sequences(config, 300, available)
    assert sequences.tolist() == [tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(available)]
    with pytest.raises(UserError, match=rf"eval\.sequences={available + 1} must be at most {available}"):
        validation_sequences(config, 300, available + 1)
    train = [1, *tokenizer.encode("alpha beta"), 2] * LENGTH
    first = stream_order(build(config), WINDOW)
    assert sorted(first) == sorted(train[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(WINDOW))


def test_stream_without_text_ends(folder: Path, tmp_path: Path) -> None:
    """An epoch without a token is an error of this rank, not an endless loop."""
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": null}\n')
    stream = build(streamed(folder, data_files=[str(path)], lanes=1))
    with pytest.raises(UserError, match="lane 0 of the streamed dataset holds no text") as caught:
        stream.take(1, 0, 1)
    assert getattr(caught.value, "of_one_rank", False)


def test_bad_token_is_an_error_of_one_rank(folder: Path) -> None:
    packed = PackedTokens(folder / "prepared", "train", LENGTH, 10)
    with pytest.raises(UserError, match=r"model\.vocab_size=10") as caught:
        MapStream(packed, SEED, {}).take(1, 0, 1)
    assert getattr(caught.value, "of_one_rank", False)


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
