"""A tokenizer of each kind."""

import pytest

from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.train import train_tokenizer
from tests.unit.data.tokenizers.texts import SENTENCES


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(SENTENCES * 5, 400, tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(scope="session")
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
