"""Tokenizers from a sentencepiece `.model`."""

from collections.abc import Sequence
from pathlib import Path

from data.errors import UserError
from data.tokenizers.base import SPACE_MARK, Encode, Tokenizer, byte_of_fallback


def load(path: Path) -> Tokenizer:
    """Load a sentencepiece model; a UserError says why the file cannot serve as one."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"tokenizer: {path} is not a sentencepiece model ({error})") from error
    if model.eos_id() < 0:
        raise UserError(
            f"tokenizer: {path} has no end-of-sentence piece, which separates documents; use a model with one"
        )
    pieces = [_bytes_of(model, i) for i in range(model.get_piece_size())]
    bos_id = model.bos_id() if model.bos_id() >= 0 else model.eos_id()
    return Tokenizer(path, _encoder(model, pieces), pieces, bos_id, model.eos_id())


def _encoder(model, pieces: list[bytes]) -> Encode:
    def encode_plain(texts: Sequence[str], threads: int) -> list[list[int]]:
        return model.encode(list(texts), num_threads=threads)

    mark_ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    spells_bytes = all(model.is_byte(i) for i in mark_ids)
    keeps_spaces = b"".join(pieces[i] for i in model.encode("  a")) == b"  a"

    # sentencepiece would decode a U+2581 of the text itself to a space, so it is spelled byte by byte.
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

    return encode_marks if spells_bytes and keeps_spaces else encode_plain


def _bytes_of(model, i: int) -> bytes:
    piece = model.id_to_piece(i)
    if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
        return b""
    return byte_of_fallback(piece) if model.is_byte(i) else piece.replace(SPACE_MARK, " ").encode()
