"""Tokenizers from a Hugging Face `tokenizer.json`: byte-level BPE, or BPE with byte fallback."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from data.errors import UserError
from data.reading import read_json
from data.tokenizers.base import SPACE_MARK, Tokenizer, byte_of_fallback

# Tried in this order if no tokenizer_config.json beside the tokenizer.json names the special tokens.
KNOWN_BOS = ("<s>", "<\uff5cbegin▁of▁sentence\uff5c>", "<|begin_of_text|>", "<bos>", "[BOS]")
KNOWN_EOS = ("</s>", "<\uff5cend▁of▁sentence\uff5c>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>")


def load(path: Path) -> Tokenizer:
    """Load a tokenizer.json; a UserError says why the file cannot serve as one."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer: {path} is not a tokenizer.json ({error})") from error
    tokenizer.encode_special_tokens = True  # text that looks like a special token stays text

    def encode(texts: Sequence[str], threads: int) -> list[list[int]]:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    bos_id, eos_id = _special_ids(path, tokenizer)
    return Tokenizer(path, encode, _pieces(path, tokenizer), bos_id, eos_id)


def _pieces(path: Path, tokenizer) -> list[bytes]:
    description = json.loads(tokenizer.to_str())
    decoder = json.dumps(description["decoder"])
    if '"ByteLevel"' in decoder:
        to_byte = _byte_level_alphabet()
    elif '"ByteFallback"' in decoder:
        to_byte = None
    else:
        raise UserError(
            f"tokenizer: {path} is neither a byte-level BPE nor a BPE with byte fallback; use one of these"
        )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {token["id"]: token for token in description["added_tokens"]}
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for piece, i in vocabulary.items():
        if i in added:
            pieces[i] = b"" if added[i]["special"] else piece.encode()
        elif to_byte is not None:
            if strange := set(piece) - to_byte.keys():
                raise UserError(
                    f"tokenizer: {path} has the piece {piece!r}; {min(strange)!r} stands for no byte"
                )
            pieces[i] = bytes(to_byte[character] for character in piece)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            pieces[i] = byte_of_fallback(piece)
        else:
            pieces[i] = piece.replace(SPACE_MARK, " ").encode()
    return pieces


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's map from characters to bytes.

    A printable byte is its own character; the others are the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + k): byte for k, byte in enumerate(unprintable)}


def _special_ids(path: Path, tokenizer) -> tuple[int, int]:
    """Return (bos, eos), by the names in tokenizer_config.json beside the file, else by well-known names."""
    sibling = path.with_name("tokenizer_config.json")
    try:
        named = read_json(sibling)
    except FileNotFoundError:
        named = {}
    except ValueError as error:
        raise UserError(f"tokenizer: {sibling} is no JSON ({error})") from None

    def find(field: str, known: tuple[str, ...]) -> int | None:
        name = named.get(field) if isinstance(named, dict) else None
        name = name.get("content") if isinstance(name, dict) else name
        candidates = (str(name),) if name else known
        return next((i for i in map(tokenizer.token_to_id, candidates) if i is not None), None)

    eos_id = find("eos_token", KNOWN_EOS)
    if eos_id is None:
        raise UserError(
            f"tokenizer: {path} has no end-of-document token; name eos_token in {sibling.name} beside it"
        )
    bos_id = find("bos_token", KNOWN_BOS)
    return (eos_id if bos_id is None else bos_id), eos_id
