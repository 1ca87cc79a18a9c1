"""The tokenizer of a run as the files that `transformers` and vLLM load.

A tokenizer.json is copied unchanged. A sentencepiece model becomes a tokenizer.json that encodes every text
to the same tokens. sentencepiece joins the neighbours whose union is the piece of highest score;
`tokenizers` joins those whose merge is listed first. So every way to cut a piece into two pieces becomes a
merge, and the merges are sorted by falling score.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from data.tokenizers.base import SPACE_MARK, Tokenizer
from dsv2.errors import UserError


def write_tokenizer(tokenizer: Tokenizer, longest: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`; a sentencepiece model also as it is.

    With its special tokens switched off, the written tokenizer encodes every text as `tokenizer` does.
    A converted sentencepiece model puts bos before a text by default, as documents begin in training. A
    copied tokenizer.json keeps its own behaviour.

    Args:
        longest: tokens of the longest sequence that the model supports.

    Raises:
        UserError: a sentencepiece model that changes texts, or is no BPE with byte fallback.
    """
    from tokenizers import Tokenizer as HFTokenizer

    target = folder / "tokenizer.json"
    if tokenizer.path.suffix == ".json":
        shutil.copyfile(tokenizer.path, target)
        written = HFTokenizer.from_file(str(target))
    else:
        written = _from_sentencepiece(tokenizer)
        written.save(str(target))
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")  # the only form that llama.cpp converts
    config = {
        # LlamaTokenizerFast and similar classes would replace parts of tokenizer.json with their own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": written.id_to_token(tokenizer.bos_id),
        "eos_token": written.id_to_token(tokenizer.eos_id),
        "pad_token": written.id_to_token(tokenizer.eos_id),  # as in the published folders
        # transformers 4 would add token_type_ids, which the model refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that spells a special token stays text, as in training
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _from_sentencepiece(tokenizer: Tokenizer) -> Any:
    """Return a `tokenizers.Tokenizer` that encodes like the sentencepiece model at `tokenizer.path`.

    Pieces are spelled with plain spaces, and nothing normalises the text. A U+2581 in a text is therefore
    not a space. It is missing from the vocabulary and becomes bytes, as in `data.tokenizers`.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, decoders, models, processors
    from tokenizers import Tokenizer as HFTokenizer

    model: Any = sentencepiece_model_pb2
    proto = model.ModelProto.FromString(tokenizer.path.read_bytes())
    _refuse_lossy(tokenizer.path, proto)
    kinds = model.ModelProto.SentencePiece
    unknown = proto.trainer_spec.unk_piece
    pieces = [(piece.piece.replace(SPACE_MARK, " "), piece) for piece in proto.pieces]
    vocabulary = {text: index for index, (text, _) in enumerate(pieces)}
    scores = {text: piece.score for text, piece in pieces if piece.type == kinds.NORMAL}
    made = HFTokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(scores), unk_token=unknown, byte_fallback=True)
    )
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    special = [text for text, piece in pieces if piece.type in (kinds.UNKNOWN, kinds.CONTROL)]
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    whole = [text for text, piece in pieces if piece.type == kinds.USER_DEFINED]
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in whole])
    bos = proto.pieces[tokenizer.bos_id].piece
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    return made


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, by the falling score of that piece.

    The order of the cuts of one piece would matter only if two of them overlapped in a text. In 32,000 texts
    of repetitions, for 80 vocabularies trained on such texts, they never did.
    """
    merges = []
    for piece in sorted(scores, key=lambda text: -scores[text]):
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [cut for cut in cuts if cut[0] in scores and cut[1] in scores]
    return merges


def _refuse_lossy(path: Path, proto: Any) -> None:
    trainer = proto.trainer_spec
    normalizer = proto.normalizer_spec
    wanted = {
        "model_type=bpe": trainer.model_type == trainer.BPE,
        "byte_fallback=true": trainer.byte_fallback,
        "add_dummy_prefix=false": not normalizer.add_dummy_prefix,
        "remove_extra_whitespaces=false": not normalizer.remove_extra_whitespaces,
        "normalization_rule_name=identity": not normalizer.precompiled_charsmap,
        "treat_whitespace_as_suffix=false": not trainer.treat_whitespace_as_suffix,
    }
    if missing := [name for name, holds in wanted.items() if not holds]:
        raise UserError(
            f"tokenizer: {path} cannot become a tokenizer.json that encodes alike; train it with "
            f"{', '.join(missing)}, as data.prepare does"
        )
