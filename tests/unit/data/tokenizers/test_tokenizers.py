"""Tokenizers: decoding returns the text, and the bytes of the tokens are the bytes of the text."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.train import train_tokenizer
from dsv2.errors import UserError

SENTENCES = [
    "def take(self, total, start, count):\n    return self.values[start : start + count]\n",
    "The quick brown fox jumps over the lazy dog.\r\nAnd again, 1234 times.\n",
    "Größe, naïve café: übermäßig schön. \n\n\n\tindented\n",
    "class Tokenizer:\n    '''Text to ids and back.'''\n\n    def encode(self, text):\n        pass\n",
]
ODD_TEXTS = [
    "",
    " ",
    "  two  spaces  ",
    "tabs\t\tand\r\nCRLF\rand\x0bother\x0cbreaks\x1c\x85\u2028\u2029here\n\n",
    "\0NUL \x01\x1b\x7f control",
    "<s></s><unk><0x0A> look like pieces",
    "▁ U+2581 ▁▁ is a space to sentencepiece▁",
    "\ufeffBOM \ufffd \u00a0 \u3000 \U0010ffff \ue000",
    "日本語 العربية 👩‍👩‍👧 e\u0301 é",
    "<|endoftext|> is text too",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(SENTENCES * 5, 400, tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A GPT-2-like tokenizer.json, with a special and a plain added token."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    made = HFTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.add_tokens([AddedToken("¿word?", normalized=False)])
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    made.save(str(path))
    return load_tokenizer(path)


def round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids


@pytest.mark.parametrize("text", [*SENTENCES, *ODD_TEXTS])
def test_trained_tokenizer_is_lossless(trained: Tokenizer, text: str) -> None:
    round_trips(trained, text)


@pytest.mark.parametrize("text", [*SENTENCES, *ODD_TEXTS, "an ¿word? inside"])
def test_byte_level_json_is_lossless(byte_level: Tokenizer, text: str) -> None:
    round_trips(byte_level, text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_unicode_is_lossless(trained: Tokenizer, text: str) -> None:
    round_trips(trained, text)


@settings(max_examples=50, deadline=None)
@given(lines=st.lists(st.sampled_from([*"ab \t\r\n▁é", "def ", "return", "\r\n", "1234"])))
def test_newlines_are_never_inside_a_longer_piece(trained: Tokenizer, lines: list[str]) -> None:
    """So cutting a document at line ends changes no token of it."""
    text = "".join(lines)
    cut = [line + "\n" for line in text.split("\n")]
    cut[-1] = cut[-1][:-1]
    assert [i for line in cut for i in trained.encode(line)] == trained.encode(text)


def test_batch_and_threads_change_nothing(trained: Tokenizer, byte_level: Tokenizer) -> None:
    texts = SENTENCES + ODD_TEXTS
    for tokenizer in (trained, byte_level):
        alone = [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch(texts) == alone
        assert tokenizer.encode_batch(texts, threads=2) == alone


def test_pieces_compress(trained: Tokenizer) -> None:
    text = SENTENCES[0]
    assert len(trained.encode(text)) < len(text) / 2


def test_special_tokens_decode_to_nothing(trained: Tokenizer) -> None:
    ids = [trained.bos_id, *trained.encode("a b"), trained.eos_id]
    assert trained.decode(ids) == "a b"
    assert (trained.bos_id, trained.eos_id) == (1, 2)


def test_token_bytes(trained: Tokenizer) -> None:
    sizes = trained.token_bytes()
    assert sizes.dtype == np.int32
    assert sizes.shape == (trained.vocab_size,) == (400,)
    assert sizes[[0, 1, 2]].tolist() == [0, 0, 0]  # <unk>, <s>, </s>
    assert sizes[3:260].tolist() == [1] * 257  # "\n" and the 256 bytes
    assert sizes[260:].min() >= 1


def test_training_is_deterministic(tmp_path: Path, trained: Tokenizer) -> None:
    again = train_tokenizer(iter(SENTENCES * 5), 400, tmp_path / "again.model")
    assert again.sha256 == trained.sha256
    other = train_tokenizer(SENTENCES * 5, 401, tmp_path / "other.model")
    assert other.sha256 != trained.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.model", "other.model"]


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (100, r"--vocab-size 100: .* 100 vs \d+\. Increase"),
        (50_000, r"--vocab-size 50000: .* a value <= \d+"),
    ],
)
def test_impossible_vocabulary(tmp_path: Path, vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(SENTENCES, vocab_size, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_training_without_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training text"):
        train_tokenizer(["", "\n"], 300, tmp_path / "t.model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", b"a", "neither a sentencepiece .model nor a tokenizer.json"),
        ("bad.model", b"not a model", "is not a sentencepiece model"),
        ("bad.json", b"{}", "is not a tokenizer.json"),
    ],
)
def test_files_that_are_no_tokenizers(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="there is no file"):
        load_tokenizer(tmp_path / "missing.model")


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
