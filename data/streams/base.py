"""The interfaces of data sources and streams, and of the ranks that share a training stream.

A stream is one global order of sequences 0, 1, 2, ..., of which every rank takes its share. Only the data
configuration determines this order: neither the number of ranks nor stops and resumes change it. Importing
this file does not import torch, so that a mistake in the configuration is reported at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from data.config import DataConfig
from data.errors import UserError
from data.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Transfer(Protocol):
    """Rows on their way between ranks."""

    def wait(self) -> "Tensor":
        """Return the received rows, by sender."""
        ...


class Ranks(Protocol):
    """The processes that share a stream, with the collectives that it needs. Every method is collective."""

    rank: int  # this process
    size: int

    def gather(self, x: "Tensor") -> "Tensor":
        """Return [size, *x.shape]: every rank's x, in rank order."""
        ...

    def exchange(self, x: "Tensor", send: list[int], receive: list[int]) -> Transfer:
        """Start to send the next `send[w]` rows of x to each rank w. Rank w sends `receive[w]` rows here."""
        ...

    def objects(self, value: T) -> list[T]:
        """Return every rank's value, in rank order."""
        ...


@dataclass(frozen=True)
class Batch:
    input_ids: "Tensor"  # int64 [B, S]
    labels: "Tensor"  # int64 [B, S]: the token that follows each input
    sequence_ids: "Tensor"  # int64 [B]: position of each sequence in the run's global order


def batch_of(sequences: np.ndarray, positions: np.ndarray) -> Batch:
    """Split int64 [B, S + 1] into inputs and labels. Their ids are `positions` [B] in the global order."""
    import torch

    tokens = torch.from_numpy(sequences)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.from_numpy(positions))


class Stream(Protocol):
    """The global order of sequences, and how far it has been handed out."""

    consumed: int  # sequences handed out so far, over all ranks

    def take(self, total: int, start: int, count: int) -> Batch:
        """Advance by `total` sequences; return the caller's share, `count` of them from offset `start`.

        Collective: all ranks call it with the same `total`; shares may overlap or leave gaps.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-able state, the same on every rank. Collective."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            UserError: `state` belongs to another order; the message lists the differences.
        """
        ...


class DataSource(ABC):
    """One kind of data; sources.py lists all. It has no state: every method gets the configuration.

    Methods raise a UserError for a user's mistake. It names the field, its value and what would be right.
    """

    name: ClassVar[str]  # the value of data.source
    tokenizer_field: ClassVar[str]  # the field that names the tokenizer, or the folder that holds it
    # keys of `fingerprint` that are hashes, with the field that names what is hashed
    hashed: ClassVar[dict[str, str]]

    def check_config(self, config: DataConfig) -> None:
        """Refuse values of the section `data` that cannot be right, without reading a file."""
        return

    @abstractmethod
    def check(self, config: DataConfig, vocab_size: int, validation: int) -> None:
        """Find mistakes in the data before any process group exists, and prepare the data if necessary.

        Args:
            vocab_size: the model's.
            validation: how many validation sequences the run will need; 0 for none.
        """

    @abstractmethod
    def tokenizer(self, config: DataConfig) -> Tokenizer:
        """Return the tokenizer that made the data."""

    @abstractmethod
    def training(self, config: DataConfig, vocab_size: int, ranks: Ranks) -> Stream:
        """Return the training stream for this rank; call `check` first."""

    @abstractmethod
    def validation(self, config: DataConfig, vocab_size: int, count: int) -> np.ndarray:
        """Return int64 [count, S + 1]: the first sequences of the validation split."""

    @abstractmethod
    def fingerprint(self, config: DataConfig) -> dict[str, Any]:
        """Return everything that determines the global order, as JSON-able values by field name."""

    def token_bytes(self, config: DataConfig) -> np.ndarray:
        """Return int32 [vocabulary]: the UTF-8 bytes that each id stands for, 0 for special tokens."""
        return self.tokenizer(config).token_bytes()

    def unigram_nats(self, config: DataConfig) -> float | None:
        """Return the nats per validation token that token frequencies alone reach; None if unknown."""
        return None


def require_share(total: int, start: int, count: int) -> None:
    """Raise ValueError unless `count` sequences from `start` lie within a `take` of `total`."""
    if not 0 <= start <= start + count <= total:
        raise ValueError(f"the share [{start}, {start + count}) must lie in [0, {total})")


def require_vocabulary(size: int, vocab_size: int, what: str) -> None:
    """Refuse a model whose vocabulary is smaller than the `size` of `what`."""
    if size > vocab_size:
        raise UserError(f"model.vocab_size={vocab_size}: must be at least {size}, the pieces of {what}")


def require_count(count: int, available: int, config: DataConfig) -> None:
    """Refuse more validation sequences than exist."""
    if count > available:
        raise UserError(
            f"eval.sequences={count}: must be at most {available}, the validation sequences of "
            f"data.sequence_length={config.sequence_length}; lower one of them"
        )


def require_state(state: dict[str, Any], *more: str) -> None:
    """Refuse a saved state that no stream has written; it may come from someone else.

    Args:
        more: fields besides `consumed` and `fingerprint`; each is an object.
    """
    kinds = {"consumed": int, "fingerprint": dict} | dict.fromkeys(more, dict)
    if unknown := sorted(state.keys() - kinds.keys()):
        raise UserError(f"the checkpoint's data has the unknown field {unknown[0]!r}; use a newer dsv2")
    for name, kind in kinds.items():
        value: Any = state.get(name)
        if type(value) is not kind or (kind is int and value < 0):
            raise UserError(f"the checkpoint's data has {name}={value!r}; use an older checkpoint")


def require_same(
    saved: dict[str, Any], current: dict[str, Any], hashes: Mapping[str, str] | None = None
) -> None:
    """Refuse a saved state whose fingerprint differs from the current one.

    Args:
        hashes: for keys of a fingerprint that are hashes, the words that tell the difference to people.
    """
    keys = sorted(key for key in saved.keys() | current.keys() if saved.get(key) != current.get(key))
    if keys:
        words = hashes or {}
        changes = [
            words.get(key, f"data.{key} was {saved.get(key)!r}, is {current.get(key)!r}") for key in keys
        ]
        raise UserError(
            f"the checkpoint is of other data: {'; '.join(changes)}; set the old values, or start another "
            "run from this checkpoint's weights: resume=PATH new_stage=true name=NAME"
        )
