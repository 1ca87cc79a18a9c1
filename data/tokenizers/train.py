"""Train a lossless sentencepiece tokenizer."""

import io
import os
from collections.abc import Iterable
from pathlib import Path

from data.errors import UserError
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer

TRAINING_THREADS = 4  # constant: sentencepiece writes it into the model, and equal text must give equal bytes
LONGEST_LINE = 1 << 20  # bytes; the trainer ignores longer lines


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_path: str | Path) -> Tokenizer:
    """Train a sentencepiece BPE tokenizer on `texts` and write it to `out_path` (a `.model`).

    The same texts give the same bytes.

    Raises:
        UserError: there is no text, or `vocab_size` is too large for it, or too small for its characters.
    """
    import sentencepiece

    # A list, not a generator: the trainer would turn an exception in it (Ctrl-C) into a RuntimeError.
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise UserError("--val-fraction: leaves no training text to train a tokenizer on; lower it")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            # Lossless: no normalisation, unknown characters as bytes, every space and newline kept.
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            split_digits=True,
            max_sentence_length=LONGEST_LINE,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]  # without the library's file and line; it names the limit
        raise UserError(f"--vocab-size {vocab_size}: sentencepiece refuses: {reason}") from error
    out_path = Path(out_path)
    aside = out_path.with_name(out_path.name + ".part")
    aside.write_bytes(model.getvalue())
    os.replace(aside, out_path)
    return load_tokenizer(out_path)
