"""The stream over sequences with random access: epoch after epoch, each in another order."""

from typing import Any, Protocol

import numpy as np

from data.streams.base import Batch, batch_of, require_same, require_share, require_state
from data.streams.order import permuted_index


class Sequences(Protocol):
    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return int64 [n, S + 1]: the sequences at `indices` [n]."""
        ...


class MapStream:
    """A stream whose state is one number, because the seed and the epoch determine each order."""

    def __init__(self, sequences: Sequences, seed: int, fingerprint: dict[str, Any]) -> None:
        self.consumed = 0
        self._sequences = sequences
        self._seed = seed
        self._fingerprint = fingerprint

    def take(self, total: int, start: int, count: int) -> Batch:
        require_share(total, start, count)
        positions = self.consumed + start + np.arange(count)
        epochs = positions // len(self._sequences)
        offsets = positions % len(self._sequences)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            indices[in_epoch] = permuted_index(offsets[in_epoch], len(self._sequences), self._seed, epoch)
        tokens = self._sequences.take(indices)
        self.consumed += total
        return batch_of(tokens, positions)

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_state(state)
        require_same(state["fingerprint"], self._fingerprint)
        self.consumed = state["consumed"]
