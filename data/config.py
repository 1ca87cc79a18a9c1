"""The section `data` of the configuration: which text, in which order."""

import enum
from dataclasses import dataclass


class DataSource(enum.Enum):
    stdlib = "stdlib"  # the running Python's standard library sources, prepared on first use
    local = "local"  # a folder written by `python -m data.prepare`
    hf_stream = "hf_stream"  # a Hugging Face hub dataset, streamed and tokenised on the fly


@dataclass
class DataConfig:
    source: DataSource = DataSource.stdlib
    sequence_length: int = 256  # tokens a sequence
    seed: int = 0  # order of the training sequences
    path: str = "???"  # the prepared folder (stdlib, local); ??? is Hydra's word for "must be given"
    # stdlib only
    vocab_size: int = 4096  # pieces of the tokenizer trained on it
    # hf_stream only
    dataset: str | None = None  # name on the hub, or a builder such as "json" with data_files
    subset: str | None = None
    data_files: list[str] | None = None
    split: str = "train"
    val_split: str = "validation"  # equal to split: one document in 100, by a hash of its text, is held out
    text_column: str = "text"
    tokenizer: str | None = None  # a sentencepiece .model or a tokenizer.json
    lanes: int = 8  # independent sub-streams; at most the number of the dataset's files
    shuffle_window: int = 64  # sequences shuffled together within a lane
