"""Prepared shards as training sequences: memory-mapped, cut out of the documents laid end to end."""

from pathlib import Path

import numpy as np

from data.errors import UserError
from data.prepared.manifest import load_manifest
from data.prepared.shards import read_tokens


class PackedTokens:
    """The sequences of one split of a prepared folder.

    Documents (each with its bos and eos) lie end to end in shard order. Sequence i is the S + 1 tokens
    from i * S on: S inputs, and the labels one further; neighbours share one token, so every token but
    the first is a label once.

    Raises:
        UserError: the folder is not a prepared one, or the split holds less than one sequence.
    """

    def __init__(self, folder: str | Path, split: str, sequence_length: int, vocab_size: int) -> None:
        self.folder = Path(folder)
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self._arrays: list[np.ndarray] = []  # the memory-mapped pieces, in order
        self._files: list[str] = []  # the shard of each piece
        for shard in load_manifest(folder).split(split).shards:
            arrays = read_tokens(self.folder / shard.file)
            if (found := sum(map(len, arrays))) != shard.tokens:
                raise UserError(
                    f"data: {self.folder / shard.file} holds {found} tokens in place of {shard.tokens}; "
                    f"remove {folder} and prepare it again"
                )
            self._arrays += arrays
            self._files += [shard.file] * len(arrays)
        self._starts = np.cumsum([0, *map(len, self._arrays)])  # where each piece begins, and the end
        tokens = int(self._starts[-1])
        if tokens <= sequence_length:
            raise UserError(
                f"data.sequence_length={sequence_length}: the {split} split of {folder} has {tokens} tokens; "
                f"one sequence takes {sequence_length + 1}"
            )
        self._length = (tokens - 1) // sequence_length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        """Return int64 [S + 1]: one sequence."""
        return self.take(np.array([index]))[0]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return int64 [n, S + 1]: the sequences at `indices` [n], each in [0, len(self)).

        Raises:
            UserError: one of them holds an id that the model has no embedding for.
        """
        sequences = np.empty((len(indices), self.sequence_length + 1), np.int64)
        for row, index in zip(sequences, indices.tolist(), strict=True):
            if not 0 <= index < self._length:
                raise IndexError(f"sequence {index} is not in [0, {self._length})")
            self._copy(index * self.sequence_length, row)
        return sequences

    def _copy(self, start: int, row: np.ndarray) -> None:
        """Fill `row` with the tokens from `start` on, from as many pieces as that takes."""
        piece = int(np.searchsorted(self._starts, start, side="right")) - 1
        filled = 0
        while filled < len(row):
            offset = start + filled - int(self._starts[piece])
            values = self._arrays[piece][offset : offset + len(row) - filled]
            if len(values) and (largest := int(values.max())) >= self.vocab_size:
                raise UserError(
                    f"data: {self.folder / self._files[piece]} holds the token id {largest}, "
                    f"and model.vocab_size={self.vocab_size} must be above it"
                )
            row[filled : filled + len(values)] = values
            filled += len(values)
            piece += 1
