"""tokenizer.json files: decoding returns the text, and special tokens are found."""

import json
from pathlib import Path

import pytest

from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from dsv2.errors import UserError
from tests.unit.data.tokenizers.texts import ODD_TEXTS, SENTENCES, round_trips


@pytest.mark.parametrize("text", [*SENTENCES, *ODD_TEXTS, "an ¿word? inside"])
def test_byte_level_json_is_lossless(byte_level: Tokenizer, text: str) -> None:
    round_trips(byte_level, text)


def test_special_tokens_are_named_beside_the_json(tmp_path: Path, byte_level: Tokenizer) -> None:
    """A well-known name is found by itself; another one is read from tokenizer_config.json."""
    assert byte_level.eos_id == byte_level.bos_id == 0
    text = byte_level.path.read_text(encoding="utf-8").replace("<|endoftext|>", "[[end]]")
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"name eos_token in tokenizer_config\.json"):
        load_tokenizer(path)
    named = {"eos_token": {"content": "[[end]]"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    assert load_tokenizer(path).eos_id == 0


@pytest.mark.parametrize("text", ["{", "\udcff", "[" * 100_000])
def test_strange_names_beside_the_json_are_one_message(
    tmp_path: Path, byte_level: Tokenizer, text: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(byte_level.path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"tokenizer_config.json is no JSON"):
        load_tokenizer(path)
    for names in ("[]", '{"eos_token": {"id": 3}}', '{"eos_token": [3]}'):
        (tmp_path / "tokenizer_config.json").write_text(names)
        if "[3]" not in names:
            assert load_tokenizer(path).eos_id == 0, "it names nothing"


def test_byte_fallback_json(tmp_path: Path) -> None:
    """The layout of LLaMA-like tokenizer.json files: pieces with U+2581, missing characters as bytes."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, normalizers

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "é"]
    vocabulary = {name: i for i, name in enumerate(names)}
    made = HFTokenizer(
        models.BPE(
            vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode(" aé\n") == [261, 262, 3 + 10]
    for text in (" a a", "zß\t\n a", "é<s>"):
        round_trips(tokenizer, text)
