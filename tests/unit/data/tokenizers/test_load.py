"""Loading tokenizers: batches, and files that are none."""

from pathlib import Path

import pytest

from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from dsv2.errors import UserError
from tests.unit.data.tokenizers.texts import ODD_TEXTS, SENTENCES


def test_batch_and_threads_change_nothing(trained: Tokenizer, byte_level: Tokenizer) -> None:
    texts = SENTENCES + ODD_TEXTS
    for tokenizer in (trained, byte_level):
        alone = [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch(texts) == alone
        assert tokenizer.encode_batch(texts, threads=2) == alone


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
