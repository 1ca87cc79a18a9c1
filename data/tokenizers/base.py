"""The `Tokenizer` class, the same for every kind of tokenizer file (load.py).

A tokenizer is a function from text to ids, and one table: the UTF-8 bytes that each id stands for. Decoding
joins these bytes, and bits per byte counts them, so both are exact by construction.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

SPACE_MARK = "▁"  # U+2581: how sentencepiece spells a space inside its pieces

Encode = Callable[[Sequence[str], int], list[list[int]]]  # (texts, threads) -> ids of each text


class Tokenizer:
    """Text to ids and back. Text never becomes a special token, and special tokens decode to nothing.

    Attributes:
        path: the tokenizer's file.
        sha256: of that file's bytes.
        vocab_size: every id is below it.
        bos_id, eos_id: put before and after every document; equal if the tokenizer has only one.
    """

    def __init__(self, path: Path, encode: Encode, pieces: list[bytes], bos_id: int, eos_id: int) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.vocab_size = len(pieces)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._encode = encode
        self._pieces = pieces

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without special tokens."""
        return self._encode([text], 1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return `encode(text)` for every text; a `tokenizer.json` chooses its own number of threads."""
        return self._encode(texts, threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return b"".join(self._pieces[i] for i in ids).decode("utf-8", errors="replace")

    @cached_property
    def pieces_sha256(self) -> str:
        """Return a hash of all pieces by id. It is equal if every id stands for the same bytes."""
        digest = hashlib.sha256()
        for piece in self._pieces:
            digest.update(len(piece).to_bytes(8, "big") + piece)
        return digest.hexdigest()

    def record(self) -> dict[str, str]:
        """Return what a checkpoint keeps about the tokenizer."""
        return {"file": str(self.path), "pieces_sha256": self.pieces_sha256}

    def token_bytes(self) -> np.ndarray:
        """Return int32 [vocab_size]: the UTF-8 bytes that each id stands for, 0 for special tokens."""
        return np.array([len(piece) for piece in self._pieces], np.int32)


def byte_of_fallback(piece: str) -> bytes:
    """Return the byte that a byte-fallback piece spells: '<0x0A>' -> b'\\n'."""
    return bytes([int(piece[3:5], 16)])
