"""The data source `hf_stream`: a Hugging Face dataset, streamed and tokenised while training.

Without a separate split for validation (`val_split` equal to `split`), one document in HELD_OUT is held out
of training for validation. A hash of its text chooses it.
"""

import zlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from data.config import DataConfig
from data.errors import UserError
from data.hub import open_stream, rows_of, text_of
from data.streams.base import DataSource, Ranks, require_count, require_vocabulary
from data.streams.lanes import Lane, LaneStream
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer

HELD_OUT = 100


class HubSource(DataSource):
    name = "hf_stream"
    tokenizer_field = "tokenizer"
    hashed: ClassVar = {"tokenizer": "tokenizer"}

    def check_config(self, config: DataConfig) -> None:
        for field in ("dataset", "tokenizer"):
            if not getattr(config, field):
                raise UserError(f"data.{field}: must be given for data=hf_stream")

    def check(self, config: DataConfig, vocab_size: int, validation: int) -> None:
        """See DataSource. This reads at most the first row, and does not count validation sequences."""
        require_vocabulary(self.tokenizer(config).vocab_size, vocab_size, "data.tokenizer")
        first = next(_rows(config, _open_training(config)), None)
        if first is not None:
            _text(config, first)
        if config.val_split != config.split:
            _open_validation(config)

    def tokenizer(self, config: DataConfig) -> Tokenizer:
        try:
            return load_tokenizer(config.tokenizer or "")
        except UserError as error:
            raise UserError(f"data.tokenizer={config.tokenizer}: {error}") from error

    def training(self, config: DataConfig, vocab_size: int, ranks: Ranks) -> LaneStream:
        tokenizer = self.tokenizer(config)
        dataset = _open_training(config)

        def tokens_of(row: dict[str, Any]) -> list[int]:
            text = _text(config, row)
            return [] if _validates(config, text) else _document(tokenizer, text)

        def lane(number: int) -> Lane:
            def share() -> Any:
                return dataset.shard(num_shards=config.lanes, index=number)

            return Lane(share, tokens_of, number, config)

        lanes = {number: lane(number) for number in range(ranks.rank, config.lanes, ranks.size)}
        return LaneStream(lanes, config.lanes, _fingerprint(config, tokenizer), ranks)

    def validation(self, config: DataConfig, vocab_size: int, count: int) -> np.ndarray:
        tokenizer = self.tokenizer(config)
        length = config.sequence_length
        needed = count * length + 1
        tokens: list[int] = []
        for text in _validation_texts(config):
            tokens += _document(tokenizer, text)
            if len(tokens) >= needed:
                break
        require_count(count, max(0, len(tokens) - 1) // length, config)
        windows = np.lib.stride_tricks.sliding_window_view(np.array(tokens[:needed], np.int64), length + 1)
        return windows[::length].copy()

    def fingerprint(self, config: DataConfig) -> dict[str, Any]:
        return _fingerprint(config, self.tokenizer(config))


def _fingerprint(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    names = ("dataset", "subset", "split", "text_column")
    names += ("lanes", "shuffle_window", "sequence_length", "seed")
    return {
        **{name: getattr(config, name) for name in names},
        "data_files": config.data_files and list(config.data_files),
        "tokenizer": tokenizer.sha256,
        "held_out": config.val_split == config.split,
    }


def _open(config: DataConfig, split: str) -> Any:
    assert config.dataset is not None  # check_config
    return open_stream(config.dataset, config.subset, config.data_files, split, section="data.")


def _open_training(config: DataConfig) -> Any:
    dataset = _open(config, config.split)
    files = dataset.num_shards
    if config.lanes > files:
        raise UserError(f"data.lanes={config.lanes}: must be at most {files}, the files of {config.dataset}")
    return dataset


def _open_validation(config: DataConfig) -> Any:
    try:
        return _open(config, config.val_split)
    except UserError as error:
        hint = f"data.val_split={config.split} holds out one document in {HELD_OUT}"
        raise UserError(f"data.val_split={config.val_split}: {error}; {hint}") from error


def _rows(config: DataConfig, dataset: Any) -> Iterator[dict[str, Any]]:
    return rows_of(dataset, f"data.dataset={config.dataset}")


def _text(config: DataConfig, row: dict[str, Any]) -> str:
    return text_of(row, config.text_column, "data.text_column", config.dataset or "")


def _document(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] if text else []


def _validates(config: DataConfig, text: str) -> bool:
    return config.val_split == config.split and zlib.crc32(text.encode()) % HELD_OUT == 0


def _validation_texts(config: DataConfig) -> Iterator[str]:
    for row in _rows(config, _open_validation(config)):
        text = _text(config, row)
        if config.val_split != config.split or _validates(config, text):
            yield text
