"""The section `data` of the configuration: which text, in which order."""

from dataclasses import dataclass


@dataclass
class DataConfig:
    source: str = "stdlib"  # stdlib, local or hf_stream; data/streams/sources.py lists them
    sequence_length: int = 256  # tokens per sequence
    seed: int = 0  # order of the training sequences
    path: str = "???"  # the prepared folder (stdlib, local); ??? is how Hydra spells "must be given"
    # stdlib only
    vocab_size: int = 4096  # pieces of the tokenizer trained on it
    # hf_stream only
    dataset: str | None = None  # name on the hub, or a builder such as "json" with data_files
    subset: str | None = None
    data_files: list[str] | None = None
    split: str = "train"
    val_split: str = "validation"  # if equal to split, one document in 100 is held out, by a hash of its text
    text_column: str = "text"
    tokenizer: str | None = None  # a sentencepiece .model or a tokenizer.json
    lanes: int = 8  # independent sub-streams; at most the number of the dataset's files
    shuffle_window: int = 64  # sequences shuffled together within a lane
