"""One lane of a streamed dataset: its share of the files as an endless, exactly resumable row of sequences.

The lane reads its documents in order, lays their tokens end to end, cuts them into sequences and
shuffles every `window` of those by a generator seeded with (seed, lane, window number). Its state is
what it needs to read the current window again: where the dataset stood before it, and the tokens left
over from the window before. (The library's own `.shuffle(buffer)` loses its buffer on resume.)
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import UserError
from data.hub import rows_of


@dataclass(frozen=True)
class LaneState:
    """Where a lane stands; all but `position` describe the start of its current window."""

    dataset: dict[str, Any] | None = None  # the dataset's own state; None: the epoch's first document
    epoch: int = 0
    remainder: tuple[int, ...] = ()  # tokens read and not yet used up
    window: int = 0
    position: int = 0  # sequences of the window handed out

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "remainder": list(self.remainder)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "LaneState":
        return cls(**{**content, "remainder": tuple(content["remainder"])})


class Lane:
    """An endless iterator over one lane's sequences.

    Args:
        open_dataset: returns this lane's `datasets.IterableDataset`, at its first document.
        tokens_of: the ids of one of its rows, bos and eos included; [] for a row to leave out.
        lane, sequence_length, window, seed: see the module's head; lengths in tokens and in sequences.
    """

    def __init__(
        self,
        open_dataset: Callable[[], Any],
        tokens_of: Callable[[dict[str, Any]], list[int]],
        lane: int,
        sequence_length: int,
        window: int,
        seed: int,
    ) -> None:
        self._open_dataset = open_dataset
        self._tokens_of = tokens_of
        self._lane = lane
        self._sequence_length = sequence_length
        self._window = window
        self._seed = seed
        self.load(LaneState())

    def load(self, state: LaneState) -> None:
        """Continue behind `state`."""
        self.state = state
        self._sequences: np.ndarray | None = None  # [window, S + 1], shuffled; None: to be read
        self._after: LaneState | None = None  # the state once they are used up
        self._open(state.dataset)

    def __iter__(self) -> "Lane":
        return self

    def __next__(self) -> np.ndarray:
        """Return int32 [S + 1]: the next sequence.

        Raises:
            UserError: a whole pass over the lane's documents gives not one token; a row cannot be read.
        """
        if self._sequences is None:
            self._sequences, self._after = self._read_window()
        sequence = self._sequences[self.state.position]
        if self.state.position + 1 < self._window:
            self.state = dataclasses.replace(self.state, position=self.state.position + 1)
        else:
            assert self._after is not None
            self.state, self._sequences = self._after, None
        return sequence

    def _open(self, dataset_state: dict[str, Any] | None) -> None:
        self._dataset = self._open_dataset()
        if dataset_state is not None:
            self._dataset.load_state_dict(dataset_state)
        self._rows = rows_of(self._dataset)
        # The dataset forgets a loaded state until its first row (its state_dict() is then all zero).
        self._opened_at = dataset_state
        self._read_any = False  # a row since it was opened
        self._tokens_since = 0

    def _read_window(self) -> tuple[np.ndarray, LaneState]:
        """Read the window that begins at `self.state`: its sequences, shuffled, and the state behind it."""
        length, wanted = self._sequence_length, self._window * self._sequence_length + 1
        tokens = list(self.state.remainder)
        epoch = self.state.epoch
        while len(tokens) < wanted:
            row = next(self._rows, None)
            if row is not None:
                found = self._tokens_of(row)
                self._read_any = True
                self._tokens_since += len(found)
                tokens += found
                continue
            if self._opened_at is None and self._tokens_since == 0:
                raise UserError(f"lane {self._lane} of the streamed dataset holds no text")
            epoch += 1
            self._open(None)
        sequences = np.lib.stride_tricks.sliding_window_view(np.array(tokens[:wanted], np.int32), length + 1)
        order = np.random.default_rng([self._seed, self._lane, self.state.window]).permutation(self._window)
        after = LaneState(
            dataset=self._dataset.state_dict() if self._read_any else self._opened_at,
            epoch=epoch,
            remainder=tuple(tokens[wanted - 1 :]),
            window=self.state.window + 1,
        )
        return sequences[::length][order], after
