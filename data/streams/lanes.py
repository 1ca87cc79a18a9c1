"""Read a dataset without random access in lanes: endless, exactly resumable series of sequences.

A lane reads its share of the files in order, concatenates the documents' tokens and cuts them into sequences.
It shuffles every window of `shuffle_window` sequences with a generator seeded with (seed, lane, window
number). Its state lets it read the current window again: the dataset's state at the window's start, and the
tokens left over from the previous window. (The library's own `.shuffle(buffer)` loses its buffer on resume.)
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.config import DataConfig
from data.errors import UserError
from data.hub import rows_of
from data.streams.base import Batch, Ranks, batch_of, require_same, require_share, require_state


@dataclass(frozen=True)
class LaneState:
    """The position of a lane. All fields except `position` describe the start of its current window."""

    dataset: dict[str, Any] | None = None  # the dataset's own state; None: before the epoch's first document
    epoch: int = 0
    remainder: tuple[int, ...] = ()  # tokens read but not yet used
    window: int = 0
    position: int = 0  # sequences of the window handed out so far

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "remainder": list(self.remainder)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "LaneState":
        return cls(**{**content, "remainder": tuple(content["remainder"])})


class Lane:
    """An endless iterator over one lane's sequences.

    Args:
        open_dataset: returns this lane's `datasets.IterableDataset`, at its first document.
        tokens_of: returns the ids of one row, bos and eos included; [] for a row to skip.
        lane: the lane's number.
        config: gives `sequence_length` (tokens), `shuffle_window` (sequences) and `seed`.
    """

    def __init__(
        self,
        open_dataset: Callable[[], Any],
        tokens_of: Callable[[dict[str, Any]], list[int]],
        lane: int,
        config: DataConfig,
    ) -> None:
        self._open_dataset = open_dataset
        self._tokens_of = tokens_of
        self._lane = lane
        self._config = config
        self.load(LaneState())

    def load(self, state: LaneState) -> None:
        """Continue after `state`."""
        self.state = state
        self._sequences: np.ndarray | None = None  # [shuffle_window, S + 1], shuffled; None: not read yet
        self._after: LaneState | None = None  # the state after these sequences
        self._open(state.dataset)

    def __iter__(self) -> "Lane":
        return self

    def __next__(self) -> np.ndarray:
        """Return int32 [S + 1]: the next sequence.

        Raises:
            UserError: a whole pass over the lane's documents gives no token, or a row cannot be read.
        """
        if self._sequences is None:
            self._sequences, self._after = self._read_window()
        sequence = self._sequences[self.state.position]
        if self.state.position + 1 < self._config.shuffle_window:
            self.state = dataclasses.replace(self.state, position=self.state.position + 1)
        else:
            assert self._after is not None
            self.state = self._after
            self._sequences = None
        return sequence

    def _open(self, dataset_state: dict[str, Any] | None) -> None:
        self._dataset = self._open_dataset()
        where = f"data.dataset={self._config.dataset}: lane {self._lane}"
        if dataset_state is not None:
            self._dataset.load_state_dict(dataset_state)
            where += " from its saved position"
        self._rows = rows_of(self._dataset, where)
        # Until its first row, a dataset does not report a loaded state: its state_dict() is all zero.
        self._opened_at = dataset_state
        self._has_read = False  # whether a row was read since the dataset was opened
        self._tokens_since = 0

    def _read_window(self) -> tuple[np.ndarray, LaneState]:
        """Read the window that begins at `self.state`: its shuffled sequences, and the state after it."""
        length = self._config.sequence_length
        size = self._config.shuffle_window
        needed = size * length + 1
        tokens = list(self.state.remainder)
        epoch = self.state.epoch
        while len(tokens) < needed:
            row = next(self._rows, None)
            if row is not None:
                row_tokens = self._tokens_of(row)
                self._has_read = True
                self._tokens_since += len(row_tokens)
                tokens += row_tokens
                continue
            if self._opened_at is None and self._tokens_since == 0:
                raise UserError(
                    f"data.dataset={self._config.dataset}: lane {self._lane} holds no text; add text to its "
                    "files, or lower data.lanes"
                )
            epoch += 1
            self._open(None)
        sequences = np.lib.stride_tricks.sliding_window_view(np.array(tokens[:needed], np.int32), length + 1)
        order = np.random.default_rng([self._config.seed, self._lane, self.state.window]).permutation(size)
        after = LaneState(
            dataset=self._dataset.state_dict() if self._has_read else self._opened_at,
            epoch=epoch,
            remainder=tuple(tokens[needed - 1 :]),
            window=self.state.window + 1,
        )
        return sequences[::length][order], after


class LaneStream:
    """The stream over n lanes: sequence g of the global order is number g // n of lane g % n.

    Rank (g % n) % W of the W ranks reads sequence g. Each `take` exchanges the sequences it covers, so a rank
    can get any share.

    Args:
        lanes: this rank's lanes, by number.
        n_lanes: n.
        fingerprint: everything that determines the order, as JSON-able values.
        ranks: the processes that share the stream.
    """

    def __init__(
        self, lanes: dict[int, Lane], n_lanes: int, fingerprint: dict[str, Any], ranks: Ranks
    ) -> None:
        self.consumed = 0
        self._lanes = lanes
        self._n_lanes = n_lanes
        self._fingerprint = fingerprint
        self._ranks = ranks

    def take(self, total: int, start: int, count: int) -> Batch:
        require_share(total, start, count)
        lanes = (self.consumed + np.arange(total)) % self._n_lanes
        owners = lanes % self._ranks.size
        mine = np.flatnonzero(owners == self._ranks.rank)  # offsets in this take
        read = [next(self._lanes[lane]) for lane in lanes[mine].tolist()]
        # A rank that reads no sequence still takes part, with an empty array of the right width.
        width = self._fingerprint["sequence_length"] + 1
        sequences = np.stack(read) if read else np.empty((0, width), np.int32)
        share = self._exchange(sequences, mine, owners, slice(start, start + count))
        positions = self.consumed + start + np.arange(count)
        self.consumed += total
        return batch_of(share.astype(np.int64), positions)

    def _exchange(
        self, sequences: np.ndarray, mine: np.ndarray, owners: np.ndarray, share: slice
    ) -> np.ndarray:
        """Send each rank its share of `sequences` [len(mine), S + 1]; return this rank's [count, S + 1]."""
        import torch

        shares = self._ranks.gather(torch.tensor([share.start, share.stop])).tolist()
        outgoing = [sequences[(mine >= first) & (mine < end)] for first, end in shares]
        senders = owners[share]
        received = self._ranks.exchange(
            torch.from_numpy(np.concatenate(outgoing)),
            send=[len(part) for part in outgoing],
            receive=np.bincount(senders, minlength=self._ranks.size).tolist(),
        ).wait()
        # The rows arrive sender by sender, and in global order from each sender.
        ordered = np.empty_like(received.numpy())
        ordered[np.argsort(senders, kind="stable")] = received.numpy()
        return ordered

    def state_dict(self) -> dict[str, Any]:
        states = {lane: reader.state.to_json() for lane, reader in self._lanes.items()}
        merged = {lane: state for part in self._ranks.objects(states) for lane, state in part.items()}
        return {
            "consumed": self.consumed,
            "fingerprint": self._fingerprint,
            "lanes": {str(lane): merged[lane] for lane in sorted(merged)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_state(state, "lanes")
        require_same(state["fingerprint"], self._fingerprint)
        self.consumed = state["consumed"]
        for lane, reader in self._lanes.items():
            try:
                reader.load(LaneState.from_json(state["lanes"][str(lane)]))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise UserError(
                    f"the checkpoint's data has no position of lane {lane} ({error!r}); use an older "
                    "checkpoint"
                ) from error
