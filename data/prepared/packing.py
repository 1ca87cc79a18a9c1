"""Cut token arrays into training sequences. The documents are concatenated first."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import UserError
from data.prepared.manifest import load_manifest
from data.prepared.shards import check_batch, open_shard


class Piece(NamedTuple):
    """A record batch of a shard."""

    file: Path
    number: int  # within the file
    ids: np.ndarray  # memory-mapped
    crc32: int | None  # of the ids; None if the folder has no checksums


class PackedTokens:
    """Sequences of S + 1 tokens, cut from arrays of token ids that count as one long array.

    Sequence i begins at token i * S. It holds S inputs and S labels, which are one token further on.
    Neighbours share one token, so every token except the first is a label once.

    A piece's checksum is compared before its first token is used, and then never again.

    Args:
        pieces: in order; a memory-mapped array stays on disk. Errors name the file.
        what: names all pieces together in errors, such as "the train split of FOLDER".

    Raises:
        UserError: there are too few tokens for one sequence.
    """

    def __init__(self, pieces: Sequence[Piece], what: str, sequence_length: int, vocab_size: int) -> None:
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self._pieces = pieces
        self._is_verified = np.array([piece.crc32 is None for piece in pieces])
        self._starts = np.cumsum([0, *(len(piece.ids) for piece in pieces)])  # of each piece, and the end
        tokens = int(self._starts[-1])
        if tokens <= sequence_length:
            raise UserError(
                f"data.sequence_length={sequence_length}: {what} has {tokens} tokens; "
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
            UserError: a piece is not what was written, or holds an id for which the model has no embedding.
        """
        sequences = np.empty((len(indices), self.sequence_length + 1), np.int64)
        for row, index in zip(sequences, indices.tolist(), strict=True):
            if not 0 <= index < self._length:
                raise IndexError(f"sequence {index} is not in [0, {self._length})")
            self._copy(index * self.sequence_length, row)
        return sequences

    def _copy(self, start: int, row: np.ndarray) -> None:
        """Fill `row` with the tokens from `start` on, from one piece or several."""
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        filled = 0
        while filled < len(row):
            piece = self._verified(index)
            offset = start + filled - int(self._starts[index])
            values = piece.ids[offset : offset + len(row) - filled]
            if len(values) and (largest := int(values.max())) >= self.vocab_size:
                raise UserError(
                    f"model.vocab_size={self.vocab_size}: must be above {largest}, a token id in {piece.file}"
                )
            row[filled : filled + len(values)] = values
            filled += len(values)
            index += 1

    def _verified(self, index: int) -> Piece:
        piece = self._pieces[index]
        if not self._is_verified[index]:
            assert piece.crc32 is not None
            check_batch(piece.ids, piece.crc32, piece.file, piece.number)
            self._is_verified[index] = True
        return piece


def open_split(folder: str | Path, split: str, sequence_length: int, vocab_size: int) -> PackedTokens:
    """Return the sequences of one split of a prepared folder, memory-mapped.

    Raises:
        UserError: the folder is not prepared or is damaged, or the split holds less than one sequence.
    """
    pieces: list[Piece] = []
    for shard in load_manifest(folder).split(split).shards:
        arrays = open_shard(Path(folder), shard)
        checksums = shard.crc32 or [None] * len(arrays)
        for number, (ids, crc32) in enumerate(zip(arrays, checksums, strict=True)):
            pieces.append(Piece(Path(folder) / shard.file, number, ids, crc32))
    return PackedTokens(pieces, f"the {split} split of {folder}", sequence_length, vocab_size)
