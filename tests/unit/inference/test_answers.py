"""The command line that continues text, on a checkpoint made here."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.config import DataConfig
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.train import train_tokenizer
from dsv2.config.schema import BalanceConfig, Config
from dsv2.inference.answers import print_answers, settled
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from tests.unit.helpers import REPO, run_verb, save_checkpoint, tiny_config

CONTEXT, PIECES = 40, 280


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; its model has room for more ids than the tokenizer knows."""
    folder = tmp_path_factory.mktemp("run")
    train_tokenizer(["one two three, a few words, naïve\n" * 20], PIECES, folder / "tokenizer.model")
    model_config = tiny_config(
        vocab_size=300,
        max_position_embeddings=CONTEXT,
        balance=BalanceConfig(token_dropping=True, capacity_factor=0.1, exempt_fraction=0.0),
    )
    data = DataConfig(source="hf_stream", path="", tokenizer=str(folder / "tokenizer.model"))
    model = DeepseekV2(model_config)
    for step, seed in ((3, 1), (7, 0)):
        init_weights(model, 0.3, seed)
        save_checkpoint(
            folder / "checkpoints" / f"step-{step:08d}", model, Config(model=model_config, data=data)
        )
    return folder


@pytest.fixture
def tokenizer(run_dir: Path) -> Tokenizer:
    return load_tokenizer(run_dir / "tokenizer.model")


@pytest.fixture
def answer(run_dir: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    def run(*arguments: str, checkpoint: Path = run_dir) -> str:
        assert run_verb("generate", str(checkpoint), *arguments) == 0
        return capsys.readouterr().out

    return run


@torch.no_grad()
def by_full_forwards(checkpoint: Path, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """The likeliest tokens, each from a forward over all before it."""
    from dsv2.inference.model import load_model

    model = load_model(checkpoint)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    start = len(ids)
    for _ in range(count):
        logits = model(torch.tensor([ids]), None, torch.zeros(1, dtype=torch.long))[0, -1]
        token = int(logits[: tokenizer.vocab_size].argmax())
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return prompt + tokenizer.decode(ids[start:])


def test_greedy_is_the_full_forwards_text(run_dir, tokenizer, answer):
    newest = run_dir / "checkpoints" / "step-00000007"
    expected = by_full_forwards(newest, tokenizer, "one two", 20) + "\n"
    assert answer("--prompt", "one two", "--max-tokens", "20") == expected, "the run's newest checkpoint"
    assert answer("--prompt", "one two", "--max-tokens", "20", checkpoint=newest) == expected
    older = run_dir / "checkpoints" / "step-00000003"
    other = by_full_forwards(older, tokenizer, "one two", 20) + "\n"
    assert answer("--prompt", "one two", "--max-tokens", "20", checkpoint=older) == other != expected


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1.5", "--top-p", "0.9", "--seed", "4"]])
def test_prompts_together_are_each_alone(answer, sampling):
    prompts = ["one two three", "a", "few words, a few"]
    limits = ["--max-tokens", "16", *sampling]
    alone = [answer("--prompt", prompt, *limits) for prompt in prompts]
    together = answer(*(part for prompt in prompts for part in ("--prompt", prompt)), *limits)
    assert together == "".join(f"--- prompt {n}\n{text}" for n, text in enumerate(alone, start=1))
    assert len({text[len(prompt) :] for text, prompt in zip(alone, prompts, strict=True)}) == 3


def test_seeds_and_temperature(answer):
    hot = ["--prompt", "one", "--temperature", "2", "--max-tokens", "12"]
    assert answer(*hot, "--seed", "1") == answer(*hot, "--seed", "1")
    texts = {answer(*hot, "--seed", str(seed)) for seed in range(4)}
    assert len(texts) == 4
    greedy = answer("--prompt", "one", "--max-tokens", "12")
    assert answer("--prompt", "one", "--max-tokens", "12", "--temperature", "1e-6") == greedy
    # The likeliest token alone is more than a thousandth of the whole.
    assert answer(*hot, "--top-p", "0.001") == greedy


def test_up_to_the_context(answer, tokenizer, run_dir):
    room = CONTEXT - 1 - len(tokenizer.encode("one two"))
    expected = by_full_forwards(run_dir / "checkpoints" / "step-00000007", tokenizer, "one two", room)
    assert answer("--prompt", "one two", "--max-tokens", str(room)) == expected + "\n"


def test_a_character_is_shown_when_all_its_bytes_are_there(tokenizer, capsys):
    """Byte by byte, as pieces for rare characters come."""
    ids = tokenizer.encode("é€")
    assert len(ids) == 2 + 3, "the tokenizer has not seen them"
    shown = []

    def steps():
        for token in [*ids, ids[0]]:  # ends within a character
            yield [token]
            shown.append(capsys.readouterr().out)

    print_answers(["x"], steps(), tokenizer)
    assert shown == ["x", "é", "", "", "€", ""]
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"
    assert settled("a\N{REPLACEMENT CHARACTER}") == "a"


MISTAKES = [
    (["--prompt", ""], "--prompt '': must not be empty"),
    (["--prompt", "one", "--prompt", ""], "--prompt '': must not be empty"),
    (["--prompt", "one", "--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
    (["--prompt", "one", "--temperature", "-0.1"], "--temperature -0.1: must be 0"),
    (["--prompt", "one", "--temperature", "nan"], "--temperature nan: must be 0"),
    (["--prompt", "one", "--temperature", "inf"], "--temperature inf: must be 0"),
    (["--prompt", "one", "--temperature", "1", "--top-p", "0"], "--top-p 0.0: must be above 0 and at most 1"),
    (["--prompt", "one", "--temperature", "1", "--top-p", "1.1"], "--top-p 1.1: must be above 0"),
    (["--prompt", "one", "--temperature", "1", "--top-p", "nan"], "--top-p nan: must be above 0"),
    (["--prompt", "one", "--top-p", "0.5"], "--top-p 0.5: changes nothing at --temperature 0"),
    (["--prompt", "one", "--seed", "-1"], "--seed -1: must be from 0"),
    (["--prompt", "x" * 60], "--prompt: 61 tokens with the document's beginning; must be fewer than"),
    (["--prompt", "x" * 30], "--max-tokens 64: must be at most 9, what the longest prompt leaves"),
    (["--prompt", "one", "--tokenizer", "nowhere.model"], "tokenizer: there is no file nowhere.model"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(run_dir, arguments, message, capsys):
    assert run_verb("generate", str(run_dir), *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {message}")


def test_another_models_tokenizer(run_dir, tmp_path, capsys):
    train_tokenizer(["many different words make many more pieces\n" * 20], 310, tmp_path / "large.model")
    assert run_verb("generate", run_dir, "--prompt", "a", "--tokenizer", tmp_path / "large.model") == 2
    err = capsys.readouterr().err
    assert "large.model: has 310 pieces, and the model's vocab_size is 300" in err


@pytest.mark.parametrize("name", ["nothing", "tokenizer.model", "checkpoints"])
def test_what_is_no_checkpoint(run_dir, name, capsys):
    assert run_verb("generate", str(run_dir / name), "--prompt", "one") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: checkpoint {run_dir / name}: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run_dir, capsys):
    arguments = ["--prompt", "one", "--max-tokens", "8", "--device", "cuda"]
    assert run_verb("generate", str(run_dir), *arguments) == 2
    assert capsys.readouterr().err == "error: --device cuda: there is no GPU here; use --device cpu\n"


def test_help_and_mistakes_need_no_torch():
    for arguments, code in ((["--help"], 0), (["x", "--prompt", ""], 2)):
        command = [sys.executable, "-X", "importtime", "-m", "dsv2", "generate", *arguments]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        assert done.returncode == code
        modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
        assert "argparse" in modules
        assert "torch" not in modules
