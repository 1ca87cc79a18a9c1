"""One `Tokenizer` over sentencepiece models and `tokenizer.json` files, and the training of a new one.

A tokenizer is a function from text to ids plus one table: the UTF-8 bytes that every id stands for.
Decoding joins those bytes, and bits per byte count them, so both are exact by construction.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from data.errors import UserError

SPACE_MARK = "▁"  # U+2581: how sentencepiece spells a space inside its pieces
TRAINING_THREADS = 4  # a constant, as sentencepiece writes it into the model: equal text, equal bytes
LONGEST_LINE = 1 << 20  # bytes; the trainer leaves longer lines out

# Tried in this order when no tokenizer_config.json beside a tokenizer.json names the special tokens.
KNOWN_BOS = ("<s>", "<\uff5cbegin▁of▁sentence\uff5c>", "<|begin_of_text|>", "<bos>", "[BOS]")
KNOWN_EOS = ("</s>", "<\uff5cend▁of▁sentence\uff5c>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>")

Encode = Callable[[Sequence[str], int], list[list[int]]]


class Tokenizer:
    """Text to ids and back. Special tokens are never made from text, and decode to nothing.

    Attributes: `vocab_size` (ids are below it), `bos_id` and `eos_id` (put around every document; equal
    when the tokenizer has only one of them), `path`, and `sha256` of that file's bytes.
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
        """Return `encode(text)` for every text; a `tokenizer.json` chooses its number of threads itself."""
        return self._encode(texts, threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return b"".join(self._pieces[i] for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Return int32 [vocab_size]: the UTF-8 bytes that each id stands for, 0 for special tokens."""
        return np.array([len(piece) for piece in self._pieces], np.int32)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a sentencepiece `.model` or a `tokenizer.json`; a UserError names a file that is neither."""
    path = Path(path)
    if path.suffix not in (".model", ".json"):
        raise UserError(f"tokenizer: {path} is neither a sentencepiece .model nor a tokenizer.json")
    if not path.is_file():
        raise UserError(f"tokenizer: there is no file {path}")
    return _load_sentencepiece(path) if path.suffix == ".model" else _load_json(path)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_path: str | Path) -> Tokenizer:
    """Train a lossless sentencepiece BPE tokenizer on `texts` and write it to `out_path` (a `.model`).

    The same texts give the same bytes. A UserError says how a `vocab_size` that the texts cannot
    fill (or that cannot hold their characters) has to change.
    """
    import io

    import sentencepiece

    # A list, not a generator: the trainer would turn an exception in it (Ctrl-C) into a RuntimeError.
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise UserError("no training text to train a tokenizer on: lower --val-fraction")
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
        raise _training_error(vocab_size, str(error)) from error
    out_path = Path(out_path)
    aside = out_path.with_name(out_path.name + ".part")
    aside.write_bytes(model.getvalue())
    os.replace(aside, out_path)
    return load_tokenizer(out_path)


def _training_error(vocab_size: int, reason: str) -> Exception:
    if high := re.search(r"too high .* value <= (\d+)", reason):
        limit = f"is more than this text can fill: at most {high[1]}"
    elif low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        limit = f"cannot hold the bytes and the characters of this text: at least {low[1]}"
    else:
        return RuntimeError(f"sentencepiece could not train a tokenizer: {reason}")
    return UserError(f"--vocab-size {vocab_size} {limit}")


def _load_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"tokenizer: {path} is not a sentencepiece model ({error})") from error
    if model.eos_id() < 0:
        raise UserError(f"tokenizer: {path} has no end-of-sentence piece; documents could not be separated")
    pieces = [_sentencepiece_bytes(model, i) for i in range(model.get_piece_size())]

    def encode_plain(texts: Sequence[str], threads: int) -> list[list[int]]:
        return model.encode(list(texts), num_threads=threads)

    # A U+2581 in the text itself would come back as a space, so it is spelled in bytes, where the model can.
    mark_ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    spells_bytes = all(model.is_byte(i) for i in mark_ids)
    keeps_spaces = b"".join(pieces[i] for i in model.encode("  a")) == b"  a"

    def encode_marks(texts: Sequence[str], threads: int) -> list[list[int]]:
        parts = [text.split(SPACE_MARK) for text in texts]
        encoded = iter(encode_plain([part for split in parts for part in split], threads))
        result = []
        for split in parts:
            ids = next(encoded)
            for _ in split[1:]:
                ids = ids + mark_ids + next(encoded)
            result.append(ids)
        return result

    bos_id = model.bos_id() if model.bos_id() >= 0 else model.eos_id()
    encode = encode_marks if spells_bytes and keeps_spaces else encode_plain
    return Tokenizer(path, encode, pieces, bos_id, model.eos_id())


def _sentencepiece_bytes(model, i: int) -> bytes:
    piece = model.id_to_piece(i)
    if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
        return b""
    return _byte_fallback(piece) if model.is_byte(i) else piece.replace(SPACE_MARK, " ").encode()


def _byte_fallback(piece: str) -> bytes:
    """'<0x0A>' -> b'\\n'."""
    return bytes([int(piece[3:5], 16)])


def _load_json(path: Path) -> Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer: {path} is not a tokenizer.json ({error})") from error
    tokenizer.encode_special_tokens = True  # text that looks like a special token stays text

    def encode(texts: Sequence[str], threads: int) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    bos_id, eos_id = _special_ids(path, tokenizer)
    return Tokenizer(path, encode, _json_pieces(path, tokenizer), bos_id, eos_id)


def _json_pieces(path: Path, tokenizer) -> list[bytes]:
    description = json.loads(tokenizer.to_str())
    decoder = json.dumps(description["decoder"])
    if '"ByteLevel"' in decoder:
        to_byte = _byte_level_alphabet()
    elif '"ByteFallback"' in decoder:
        to_byte = None
    else:
        raise UserError(f"tokenizer: {path} is neither a byte-level BPE nor a BPE with byte fallback")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {token["id"]: token for token in description["added_tokens"]}
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for piece, i in vocabulary.items():
        if i in added:
            pieces[i] = b"" if added[i]["special"] else piece.encode()
        elif to_byte is not None:
            pieces[i] = bytes(to_byte[character] for character in piece)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            pieces[i] = _byte_fallback(piece)
        else:
            pieces[i] = piece.replace(SPACE_MARK, " ").encode()
    return pieces


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's map from printable characters to bytes: itself if printable, else 256 and upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


def _special_ids(path: Path, tokenizer) -> tuple[int, int]:
    """Find (bos, eos): named by tokenizer_config.json beside the file, else by a well-known name."""
    sibling = path.with_name("tokenizer_config.json")
    named = json.loads(sibling.read_text(encoding="utf-8")) if sibling.is_file() else {}

    def find(field: str, known: tuple[str, ...]) -> int | None:
        name = named.get(field)
        name = name["content"] if isinstance(name, dict) else name
        candidates = (name,) if name else known
        return next((i for i in map(tokenizer.token_to_id, candidates) if i is not None), None)

    eos_id = find("eos_token", KNOWN_EOS)
    if eos_id is None:
        raise UserError(
            f"tokenizer: {path} has no end-of-document token: name eos_token in {sibling.name} beside it"
        )
    bos_id = find("bos_token", KNOWN_BOS)
    return (eos_id if bos_id is None else bos_id), eos_id
