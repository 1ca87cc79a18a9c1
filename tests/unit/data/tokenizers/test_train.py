"""Training a tokenizer."""

from pathlib import Path

import pytest

from data.tokenizers.base import Tokenizer
from data.tokenizers.train import train_tokenizer
from dsv2.errors import UserError
from tests.unit.data.tokenizers.texts import SENTENCES


def test_pieces_compress(trained: Tokenizer) -> None:
    text = SENTENCES[0]
    assert len(trained.encode(text)) < len(text) / 2


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
