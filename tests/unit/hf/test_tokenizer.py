"""The exported tokenizer encodes as the trained one, to the token, and decodes to the text."""

import json
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DeepseekV2ForCausalLM

from data.corpora.stdlib import StdlibCorpus
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.train import train_tokenizer
from dsv2.errors import UserError
from dsv2.hf.fields import published_config
from dsv2.hf.tokenizer import write_tokenizer
from tests.unit.data.tokenizers.texts import ODD_TEXTS, SENTENCES
from tests.unit.hf.folders import hf_tiny

LONGEST = 10**6
RUNS = "=" * 200 + "\n" + "ab" * 50 + "\n" + "aab" * 40 + " " * 33 + "\t" * 9


def exported(tokenizer: Tokenizer, folder: Path) -> Any:
    """As transformers finds it in a model's folder."""
    config = published_config(hf_tiny(), tokenizer.bos_id, tokenizer.eos_id, "float32")
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(tokenizer, LONGEST, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [text for _, text in StdlibCorpus().documents([])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("trained")
    ours = train_tokenizer(documents[::40] + [RUNS] * 3, 2000, folder / "trained.model")
    return ours, exported(ours, folder)


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Trained on runs, so that most pieces can be cut in many ways, and overlap with themselves."""
    folder = tmp_path_factory.mktemp("repetitive")
    texts = ["a" * n + "b" * m + " " * k for n in range(1, 25) for m in range(4) for k in range(9)]
    ours = train_tokenizer([*texts, RUNS, RUNS.replace("a", "ab")] * 2, 330, folder / "trained.model")
    return ours, exported(ours, folder)


def check_same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs.decode(ids) == text


def test_real_documents(trained: tuple[Tokenizer, Any], documents: list[str]) -> None:
    """One in eight of the standard library's; whole files, most of which the training did not see."""
    ours, theirs = trained
    texts = documents[::8]
    assert sum(len(text) for text in texts) > 2_000_000
    for text in texts:
        check_same(ours, theirs, text)


@pytest.mark.parametrize("text", [*ODD_TEXTS, *SENTENCES, RUNS, "a▁b ▁ c", "<s>a</s><unk>\n<0x41>"])
def test_odd_texts(trained: tuple[Tokenizer, Any], repetitive: tuple[Tokenizer, Any], text: str) -> None:
    for ours, theirs in (trained, repetitive):
        check_same(ours, theirs, text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_unicode(trained: tuple[Tokenizer, Any], text: str) -> None:
    check_same(*trained, text)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(parts=st.lists(st.tuples(st.sampled_from(["a", "b", " ", "ab", "=", "\n"]), st.integers(1, 40))))
def test_runs(
    trained: tuple[Tokenizer, Any], repetitive: tuple[Tokenizer, Any], parts: list[tuple[str, int]]
) -> None:
    text = "".join(part * times for part, times in parts)
    for ours, theirs in (trained, repetitive):
        check_same(ours, theirs, text)


def test_special_tokens(trained: tuple[Tokenizer, Any]) -> None:
    """A text begins with bos, as documents do in training; special tokens in it are text."""
    ours, theirs = trained
    assert theirs("a b").input_ids == [ours.bos_id, *ours.encode("a b")]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.decode([ours.bos_id, *ours.encode("a <s> b"), ours.eos_id], skip_special_tokens=True) == (
        "a <s> b"
    )
    assert theirs.model_max_length == LONGEST
    assert len(theirs) == ours.vocab_size


def test_a_batch_is_padded_with_eos(trained: tuple[Tokenizer, Any]) -> None:
    ours, theirs = trained
    batch = theirs(["a", "a b c d"], padding=True, padding_side="left")
    short, long = ([ours.bos_id, *ours.encode(text)] for text in ("a", "a b c d"))
    missing = len(long) - len(short)
    assert missing > 0
    assert batch.input_ids == [[ours.eos_id] * missing + short, long]
    assert batch.attention_mask == [[0] * missing + [1] * len(short), [1] * len(long)]


def test_the_inputs_are_those_of_the_model(trained: tuple[Tokenizer, Any]) -> None:
    """By name: a class of transformers 4 makes token_type_ids unless the folder names the inputs."""
    ours, theirs = trained
    content = json.loads(ours.path.with_name("tokenizer_config.json").read_text())
    assert content["model_input_names"] == ["input_ids", "attention_mask"]
    assert list(theirs("a b")) == content["model_input_names"]
    assert set(content["model_input_names"]) < set(signature(DeepseekV2ForCausalLM.forward).parameters)


def test_it_can_be_trained_with_again(trained: tuple[Tokenizer, Any]) -> None:
    """The exported file is a tokenizer for data.prepare --tokenizer too."""
    ours, _ = trained
    again = load_tokenizer(ours.path.with_name("tokenizer.json"))
    assert (again.bos_id, again.eos_id, again.vocab_size) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    assert (again.token_bytes() == ours.token_bytes()).all()
    for text in (*ODD_TEXTS, RUNS):
        assert again.encode(text) == ours.encode(text)


def test_a_sentencepiece_model_is_shipped_too(trained: tuple[Tokenizer, Any]) -> None:
    """For clients that read nothing else; its ids are those of the tokenizer.json beside it."""
    ours, theirs = trained
    copy = ours.path.with_name("tokenizer.model")
    assert copy.read_bytes() == ours.path.read_bytes()
    assert load_tokenizer(copy).encode(RUNS) == theirs(RUNS, add_special_tokens=False).input_ids


def byte_level_json(folder: Path) -> Path:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    made = HFTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>", "<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.add_tokens([AddedToken("[word]", normalized=False)])
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<end>", "bos_token": "<begin>", "tokenizer_class": "LlamaTokenizerFast"}'
    )
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_tokenizer_json_is_passed_through(tmp_path: Path) -> None:
    """To the byte; and its tokenizer_config.json does not turn it into another class."""
    ours = load_tokenizer(byte_level_json(tmp_path / "given"))
    (tmp_path / "out").mkdir()
    theirs = exported(ours, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == ours.path.read_bytes()
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id) == (1, 0)
    for text in (*ODD_TEXTS, *SENTENCES, RUNS, "a [word] inside", "<end> and <begin> are text"):
        check_same(ours, theirs, text)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"model_type": "unigram"}, "model_type=bpe"),
        ({"byte_fallback": False}, "byte_fallback=true"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix=false"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=false"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name=identity"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=false"),
    ],
)
def test_models_that_change_texts_are_refused(tmp_path: Path, option: dict[str, Any], said: str) -> None:
    import sentencepiece

    lossless = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    }
    size = 60 if option == {"byte_fallback": False} else 320
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in SENTENCES * 9 for line in text.split("\n")),
        model_prefix=str(tmp_path / "odd"),
        minloglevel=2,
        hard_vocab_limit=False,
        **{"vocab_size": size, **lossless, **option},
    )
    with pytest.raises(UserError, match=rf"odd\.model cannot become .* train it with {said}, as"):
        write_tokenizer(load_tokenizer(tmp_path / "odd.model"), LONGEST, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
