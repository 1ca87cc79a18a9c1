"""Small files of JSON lines, as a prepared folder and as a stream, and the sequences that streams give."""

import json
from pathlib import Path

import numpy as np
import torch

from data.config import DataConfig
from data.corpora.jsonl import JsonlCorpus
from data.prepare.corpus import prepare
from data.prepare.settings import Settings
from data.streams.base import Batch, Stream
from data.streams.sources import build_stream, source_of
from data.tokenizers.train import train_tokenizer
from dsv2.parallel.mesh import ALONE

LENGTH = 20
LANES = 3
WINDOW = 4
SEED = 5
FILES = 5  # more than lanes: some lanes read two
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
COUNT = 130  # sequences: more than two epochs of either stream


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
    prepare(JsonlCorpus((f"{folder}/*.jsonl",)), folder / "prepared", settings, quiet=True)
    return folder


def texts_of(folder: Path, number: int) -> list[str]:
    lines = (folder / f"{number}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def local(folder: Path, **changes) -> DataConfig:
    path = str(folder / "prepared")
    return DataConfig(**{"source": "local", "path": path, "sequence_length": LENGTH, "seed": SEED} | changes)


def streamed(folder: Path, **changes) -> DataConfig:
    given = {
        "source": "hf_stream",
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


def check(config: DataConfig, vocab_size: int) -> None:
    source_of(config).check(config, vocab_size, validation=0)
