"""The training data as one global order of sequences, of which every rank takes its share.

Sequence 0, 1, 2, ... of a run are fixed by the data configuration alone: not by the number of ranks,
nor by where the run was stopped and resumed. `MapStream` computes each from its number; `LaneStream`
reads a dataset that can only be read forwards, its lanes spread over the ranks.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig, DataSource
from data.errors import OneRankError, UserError
from data.hub import open_stream, rows_of, text_of
from data.prepare.command import prepare_stdlib
from data.prepare.progress import refuse_instead_of_stdlib
from data.prepared.manifest import TOKEN_BYTES, load_manifest
from data.prepared.packing import PackedTokens
from data.streams.lanes import Lane, LaneState
from data.streams.order import permuted_index
from data.tokenizers.base import Tokenizer, load_tokenizer

HELD_OUT = 100  # one document in so many validates when hf_stream has no split of its own for that


T = TypeVar("T")


class Transfer(Protocol):
    """Rows on their way between ranks."""

    def wait(self) -> Tensor:
        """Return the received rows, by sender."""
        ...


class Ranks(Protocol):
    """The processes that share the data, and what a stream asks of them. Every method is collective."""

    rank: int  # this process
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """Return [size, *x.shape]: every rank's x, in rank order."""
        ...

    def exchange(self, x: Tensor, send: list[int], receive: list[int]) -> Transfer:
        """Start sending `send[w]` of x's rows to each rank w, in order; `receive[w]` rows come from it."""
        ...

    def objects(self, value: T) -> list[T]:
        """Return every rank's value, in rank order."""
        ...


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S]: the token that follows each input
    sequence_ids: Tensor  # int64 [B]: place of each sequence in the run's global order


class Stream(Protocol):
    """The global order of sequences, and how far it has been handed out."""

    consumed: int  # sequences handed out so far, over all ranks

    def take(self, total: int, start: int, count: int) -> Batch:
        """Advance by `total` sequences; return `count` of them from offset `start` on, the caller's share.

        Collective: all ranks call it with the same `total`; shares may overlap or leave gaps.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-able state, the same on every rank. Collective."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; a UserError lists what differs if it is not of this order."""
        ...


class MapStream:
    """A prepared folder: epoch after epoch, each in an order of its own. Its state is one number."""

    def __init__(self, sequences: PackedTokens, seed: int, fingerprint: dict[str, Any]) -> None:
        self.consumed = 0
        self._sequences = sequences
        self._seed = seed
        self._fingerprint = fingerprint

    def take(self, total: int, start: int, count: int) -> Batch:
        _check_share(total, start, count)
        places = self.consumed + start + np.arange(count)
        epochs, positions = np.divmod(places, len(self._sequences))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            indices[now] = permuted_index(positions[now], len(self._sequences), self._seed, epoch)
        try:
            tokens = self._sequences.take(indices)
        except UserError as error:
            raise OneRankError(str(error)) from error
        self.consumed += total
        return _batch(tokens, places)

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_fingerprint(state["fingerprint"], self._fingerprint)
        self.consumed = state["consumed"]


class LaneStream:
    """A streamed dataset in L lanes: sequence g is the (g // L)-th of lane g % L, which rank
    (g % L) % W of the W ranks reads. Each `take` exchanges the window's sequences, so any rank gets any
    share.

    Args:
        lanes: this rank's lanes, by number.
        n_lanes: L.
        fingerprint: what the order depends on, JSON-able.
        ranks: the processes that share the stream.
    """

    def __init__(
        self,
        lanes: dict[int, Lane],
        n_lanes: int,
        fingerprint: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        self.consumed = 0
        self._lanes = lanes
        self._n_lanes = n_lanes
        self._fingerprint = fingerprint
        self._ranks = ranks

    def take(self, total: int, start: int, count: int) -> Batch:
        _check_share(total, start, count)
        lanes = (self.consumed + np.arange(total)) % self._n_lanes
        owners = lanes % self._ranks.size
        mine = np.flatnonzero(owners == self._ranks.rank)  # offsets in the window
        try:
            read = [next(self._lanes[lane]) for lane in lanes[mine].tolist()]
        except UserError as error:
            raise OneRankError(str(error)) from error
        # Without one of its own a rank still takes part, with an empty array of the right width.
        width = self._fingerprint["sequence_length"] + 1
        sequences = torch.from_numpy(np.stack(read) if read else np.empty((0, width), np.int32))
        share = self._exchange(sequences, mine, owners, slice(start, start + count))
        places = self.consumed + start + np.arange(count)
        self.consumed += total
        return _batch(share.numpy().astype(np.int64), places)

    def _exchange(self, sequences: Tensor, mine: np.ndarray, owners: np.ndarray, share: slice) -> Tensor:
        """Send each rank its share of `sequences` [len(mine), S + 1]; return this rank's, int32."""
        shares = self._ranks.gather(torch.tensor([share.start, share.stop]))
        outgoing = []
        for first, end in shares.tolist():
            outgoing.append(sequences[torch.from_numpy((mine >= first) & (mine < end))])
        senders = owners[share]
        received = self._ranks.exchange(
            torch.cat(outgoing),
            send=[len(part) for part in outgoing],
            receive=np.bincount(senders, minlength=self._ranks.size).tolist(),
        ).wait()
        # They come rank by rank, each rank's in global order.
        ordered = torch.empty_like(received)
        ordered[torch.from_numpy(np.argsort(senders, kind="stable"))] = received
        return ordered

    def state_dict(self) -> dict[str, Any]:
        own = {lane: reader.state.to_json() for lane, reader in self._lanes.items()}
        merged = {lane: state for part in self._ranks.objects(own) for lane, state in part.items()}
        return {
            "consumed": self.consumed,
            "fingerprint": self._fingerprint,
            "lanes": {str(lane): merged[lane] for lane in sorted(merged)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_fingerprint(state["fingerprint"], self._fingerprint)
        self.consumed = state["consumed"]
        for lane, reader in self._lanes.items():
            reader.load(LaneState.from_json(state["lanes"][str(lane)]))


def build_stream(config: DataConfig, model_vocab_size: int, ranks: Ranks) -> Stream:
    """Return this rank's end of the training stream, which `ranks` share; call `check_data` first."""
    if config.source is not DataSource.hf_stream:
        sequences = PackedTokens(config.path, "train", config.sequence_length, model_vocab_size)
        return MapStream(sequences, config.seed, _map_fingerprint(config))
    tokenizer, dataset = tokenizer_of(config), _open_training(config)

    def tokens_of(row: dict[str, Any]) -> list[int]:
        text = _text(config, row)
        return [] if _validates(config, text) else _document(tokenizer, text)

    def lane(number: int) -> Lane:
        def share() -> Any:
            return dataset.shard(num_shards=config.lanes, index=number)

        return Lane(share, tokens_of, number, config.sequence_length, config.shuffle_window, config.seed)

    return LaneStream(
        {number: lane(number) for number in range(ranks.rank, config.lanes, ranks.size)},
        config.lanes,
        _stream_fingerprint(config, tokenizer),
        ranks,
    )


def check_data(config: DataConfig, model_vocab_size: int, validation: int = 0) -> None:
    """Find mistakes in the data before any process group is made; prepare the stdlib folder on first use.

    `validation` sequences will be wanted of the validation split; of a streamed dataset, of which no more
    than the first row is read, they are not counted.

    Raises:
        UserError: names the field, its value and what would be right.
    """
    if config.source is DataSource.hf_stream:
        _check_vocabulary(tokenizer_of(config).vocab_size, model_vocab_size, "data.tokenizer")
        _text(config, next(rows_of(_open_training(config)), {config.text_column: ""}))
        if config.val_split != config.split:
            _open_validation(config)
        return
    if config.source is DataSource.stdlib:
        refuse_instead_of_stdlib(config.path, config.vocab_size)
        _check_vocabulary(config.vocab_size, model_vocab_size, "data.vocab_size")
        prepare_stdlib(config.path, config.vocab_size)
    vocabulary = load_manifest(config.path).vocab_size
    _check_vocabulary(vocabulary, model_vocab_size, f"the tokenizer of {config.path}")
    PackedTokens(config.path, "train", config.sequence_length, model_vocab_size)
    if validation:
        held_out = PackedTokens(config.path, "validation", config.sequence_length, model_vocab_size)
        _check_count(validation, len(held_out), config)


def validation_sequences(config: DataConfig, model_vocab_size: int, count: int) -> np.ndarray:
    """Return int64 [count, S + 1]: the first `count` sequences of the validation split.

    For hf_stream without a split of its own (`val_split` equal to `split`), one document in HELD_OUT,
    chosen by its text, is kept out of training and used here.

    Raises:
        UserError: the split holds fewer than `count`.
    """
    length = config.sequence_length
    if config.source is not DataSource.hf_stream:
        packed = PackedTokens(config.path, "validation", length, model_vocab_size)
        _check_count(count, len(packed), config)
        return packed.take(np.arange(count))
    tokenizer, wanted = tokenizer_of(config), count * length + 1
    tokens: list[int] = []
    for text in _validation_texts(config):
        tokens += _document(tokenizer, text)
        if len(tokens) >= wanted:
            break
    _check_count(count, max(0, len(tokens) - 1) // length, config)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(tokens[:wanted], np.int64), length + 1)
    return windows[::length].copy()


def tokenizer_of(config: DataConfig) -> Tokenizer:
    """Return the tokenizer that the data is made with."""
    if config.source is DataSource.hf_stream:
        try:
            return load_tokenizer(config.tokenizer or "")
        except UserError as error:
            raise UserError(f"data.tokenizer={config.tokenizer}: {error}") from error
    manifest = load_manifest(config.path)
    tokenizer = load_tokenizer(Path(config.path) / manifest.tokenizer_file)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise UserError(f"data: {tokenizer.path} is not the tokenizer that {config.path} was prepared with")
    return tokenizer


def token_bytes_of(config: DataConfig) -> np.ndarray:
    """Return int32 [V]: the UTF-8 bytes that each of the tokenizer's ids stands for, 0 for special tokens."""
    if config.source is DataSource.hf_stream:
        return tokenizer_of(config).token_bytes()
    return np.load(Path(config.path) / TOKEN_BYTES)


def unigram_nats_of(config: DataConfig) -> float | None:
    """Return the nats a validation token that frequencies alone reach; None where that is not known."""
    if config.source is DataSource.hf_stream:
        return None
    return load_manifest(config.path).validation.unigram_nats


def _batch(tokens: np.ndarray, places: np.ndarray) -> Batch:
    """Split int64 [B, S + 1] into inputs and labels."""
    sequences = torch.from_numpy(tokens)
    return Batch(sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous(), torch.from_numpy(places))


def _check_share(total: int, start: int, count: int) -> None:
    if not 0 <= start <= start + count <= total:
        raise ValueError(f"the share [{start}, {start + count}) must lie in [0, {total})")


def check_resumed(config: DataConfig, state: dict[str, Any]) -> None:
    """Refuse a stream's saved `state` of other data with a UserError; `check_data` first."""
    is_stream = config.source is DataSource.hf_stream
    here = _stream_fingerprint(config, tokenizer_of(config)) if is_stream else _map_fingerprint(config)
    _check_fingerprint(state["fingerprint"], here)


def _check_fingerprint(there: dict[str, Any], here: dict[str, Any]) -> None:
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if keys:
        differences = "; ".join(f"data.{key} was {there.get(key)!r}, is {here.get(key)!r}" for key in keys)
        raise UserError(
            f"the checkpoint is of other data: {differences}; use those again, or start another run, "
            "from this checkpoint's weights with resume=PATH new_stage=true name=NAME"
        )


def _check_vocabulary(size: int, model_vocab_size: int, what: str) -> None:
    if size > model_vocab_size:
        raise UserError(f"model.vocab_size={model_vocab_size} must be at least {size}, the pieces of {what}")


def _check_count(count: int, available: int, config: DataConfig) -> None:
    if available < count:
        raise UserError(
            f"eval.sequences={count} must be at most {available}, the validation sequences of "
            f"data.sequence_length={config.sequence_length}; lower either"
        )


def _open(config: DataConfig, split: str) -> Any:
    assert config.dataset is not None  # check_data
    return open_stream(config.dataset, config.subset, config.data_files, split)


def _open_training(config: DataConfig) -> Any:
    dataset = _open(config, config.split)
    if config.lanes > (files := dataset.num_shards):
        raise UserError(f"data.lanes={config.lanes} must be at most {files}, the files of {config.dataset}")
    return dataset


def _open_validation(config: DataConfig) -> Any:
    try:
        return _open(config, config.val_split)
    except UserError as error:
        hint = f"data.val_split={config.split} holds out one document in {HELD_OUT}"
        raise UserError(f"data.val_split={config.val_split}: {error}; {hint}") from error


def _text(config: DataConfig, row: dict[str, Any]) -> str:
    return text_of(row, config.text_column, "data.text_column", config.dataset or "")


def _document(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] if text else []


def _validates(config: DataConfig, text: str) -> bool:
    return config.val_split == config.split and zlib.crc32(text.encode()) % HELD_OUT == 0


def _validation_texts(config: DataConfig) -> Iterator[str]:
    for row in rows_of(_open_validation(config)):
        text = _text(config, row)
        if config.val_split != config.split or _validates(config, text):
            yield text


def _map_fingerprint(config: DataConfig) -> dict[str, Any]:
    """What the order of a prepared folder depends on; named as in the configuration."""
    dataset = load_manifest(config.path).fingerprint
    return {"dataset": dataset, "sequence_length": config.sequence_length, "seed": config.seed}


def _stream_fingerprint(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the global order depends on; named as in the configuration."""
    names = ("dataset", "subset", "split", "text_column")
    names += ("lanes", "shuffle_window", "sequence_length", "seed")
    return {
        **{name: getattr(config, name) for name in names},
        "data_files": config.data_files and list(config.data_files),
        "tokenizer": tokenizer.sha256,
        "held_out": config.val_split == config.split,
    }
