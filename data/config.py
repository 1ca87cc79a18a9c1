"""The section `data` of the configuration: which text to train on, and in which order."""

from dataclasses import dataclass


@dataclass
class DataConfig:
    source: str = "stdlib"  # stdlib, local or hf_stream: where the text comes from (data/streams/sources.py)
    sequence_length: int = 256  # tokens per sequence
    seed: int = 0  # seed of the order of training sequences
    # stdlib and local only: the prepared folder; for stdlib, one named stdlib... is made on first use
    path: str = "???"
    vocab_size: int = 4096  # stdlib only: pieces of the tokenizer that is trained on the text
    dataset: str | None = None  # hf_stream only: name on the hub, or a builder such as json with data_files
    subset: str | None = None  # hf_stream only: the dataset's configuration, such as en
    data_files: list[str] | None = None  # hf_stream only: files or globs for a builder
    split: str = "train"  # hf_stream only: the split to train on
    val_split: str = "validation"  # hf_stream only; if equal to split, 1 document in 100 is held out
    text_column: str = "text"  # hf_stream only: the column with the text
    tokenizer: str | None = None  # hf_stream only: a sentencepiece .model or a tokenizer.json
    lanes: int = 8  # hf_stream only: independent sub-streams, at most the number of files
    shuffle_window: int = 64  # hf_stream only: sequences shuffled together within a lane
