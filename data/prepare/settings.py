"""How to prepare a corpus of any kind. The fields are options on the command line."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data.errors import UserError
from data.tokenizers.load import load_tokenizer


@dataclass(frozen=True)
class Settings:
    """Exactly one of `vocab_size` and `tokenizer` must be given."""

    vocab_size: int | None = field(
        default=None, metadata={"help": "Train a new tokenizer of this many pieces."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Use this sentencepiece .model or tokenizer.json instead of a new tokenizer."},
    )
    val_fraction: float = field(
        default=0.05,
        metadata={"help": "The share of documents held out for validation, chosen by a hash of their text."},
    )
    shard_mb: float = field(default=32, metadata={"help": "MiB of text per shard."})

    def check(self) -> None:
        """Raise a UserError for settings out of range, or that contradict each other."""
        if self.vocab_size is None and self.tokenizer is None:
            raise UserError("--vocab-size: must be given, to train a tokenizer; or give --tokenizer FILE")
        if self.vocab_size is not None and self.tokenizer is not None:
            raise UserError(
                f"--vocab-size {self.vocab_size}: must not be given with --tokenizer {self.tokenizer}"
            )
        if self.vocab_size is not None and self.vocab_size < 260:  # 256 bytes, unk, bos, eos, newline
            raise UserError(f"--vocab-size {self.vocab_size}: must be at least 260, and more for characters")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction}: must be at least 0 and below 1")
        if self.shard_mb <= 0:
            raise UserError(f"--shard-mb {self.shard_mb}: must be above 0")

    def request(self) -> dict[str, Any]:
        """Return the settings as JSON-able values. A hash of the tokenizer file stands for its path."""
        request = dataclasses.asdict(self)
        tokenizer = request.pop("tokenizer")
        return {**request, "tokenizer_sha256": tokenizer and load_tokenizer(tokenizer).sha256}
