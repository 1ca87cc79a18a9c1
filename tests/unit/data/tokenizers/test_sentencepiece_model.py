"""sentencepiece models: decoding returns the text, and the bytes of the tokens are the bytes of the text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizers.base import Tokenizer
from tests.unit.data.tokenizers.texts import ODD_TEXTS, SENTENCES, round_trips


@pytest.mark.parametrize("text", [*SENTENCES, *ODD_TEXTS])
def test_trained_tokenizer_is_lossless(trained: Tokenizer, text: str) -> None:
    round_trips(trained, text)


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
