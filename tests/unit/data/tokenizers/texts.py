"""Texts that tokenizers must give back unchanged."""

from data.tokenizers.base import Tokenizer

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


def round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids
