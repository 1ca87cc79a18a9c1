"""The validation loss and the sample are those of one process of plain torch, on every layout."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from torch.nn.functional import cross_entropy

from data.config import DataConfig
from data.corpora.jsonl import JsonlCorpus
from data.prepare.corpus import prepare
from data.prepare.settings import Settings
from data.prepared.packing import open_split
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from dsv2.config.schema import Config, EvalConfig, RuntimeConfig
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from tests.dist import jobs

SEQUENCES, LENGTH, VOCABULARY = 5, 16, 300
WORDS = ["alpha", "beta", "gämma", "delta", "ε", "zeta", "日本"]  # characters of 1, 2 and 3 bytes
# At so small a capacity, dropping changes every loss.
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "token_dropping": True,
    "capacity_factor": 0.5,
    "exempt_fraction": 0.0,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 30))}) + "\n" for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(lines))
    settings = Settings(vocab_size=VOCABULARY, val_fraction=0.2)
    prepare(JsonlCorpus((str(folder / "text.jsonl"),)), folder / "prepared", settings, quiet=True)
    return Config(
        model=jobs.model_config(**MODEL),
        data=DataConfig(
            source="local", path=str(folder / "prepared"), sequence_length=LENGTH, val_split="train"
        ),
        eval=EvalConfig(sequences=SEQUENCES, sample_prompt="alpha", sample_tokens=12),
    )


def evaluate(rank: int, world_size: int, config: Config, **layout: Any) -> tuple[float, float, str]:
    """Run on every rank: (loss, bits a byte, sample)."""
    from dsv2.training.evaluate import Evaluator

    engine = jobs.make_engine(rank, world_size, **layout, **MODEL)
    runtime = RuntimeConfig(micro_batch_size=layout["micro_batch"])
    evaluator = Evaluator(engine, replace(config, runtime=runtime))
    return *evaluator.evaluate(), evaluator.sample()


def bytes_of(tokenizer: Tokenizer, token: int) -> int:
    """UTF-8 bytes that a token adds to a text, by how its piece is written."""
    if token in (0, tokenizer.bos_id, tokenizer.eos_id):
        return 0
    piece = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).id_to_piece(token)
    return 1 if piece.startswith("<0x") else len(piece.replace("\u2581", " ").encode())


@pytest.fixture(scope="module")
def alone(config: Config) -> tuple[float, float, str]:
    """The same with plain torch, token by token."""
    model = DeepseekV2(config.model)
    init_weights(model, config.model.initializer_range, seed=0)
    model.eval()
    tokenizer = load_tokenizer(Path(config.data.path) / "tokenizer.model")
    packed = open_split(config.data.path, "validation", LENGTH, VOCABULARY)
    nats, labels, n_bytes = [], 0, 0
    for index in range(SEQUENCES):
        sequence = torch.from_numpy(packed[index])[None]
        with torch.no_grad():
            logits = model(sequence[:, :-1], None, torch.tensor([index]))
        nats.append(cross_entropy(logits[0].double(), sequence[0, 1:], reduction="sum").item())
        labels += LENGTH
        n_bytes += sum(bytes_of(tokenizer, token) for token in sequence[0, 1:].tolist())
    generator = torch.Generator().manual_seed(0)
    ids = [tokenizer.bos_id, *tokenizer.encode("alpha")]
    for _ in range(config.eval.sample_tokens):
        with torch.no_grad():
            last = model(torch.tensor([ids[-LENGTH:]]), None, torch.tensor([0]))[0, -1]
        token = int(torch.multinomial((last / 0.8).softmax(dim=-1), 1, generator=generator))
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return sum(nats) / labels, sum(nats) / np.log(2) / n_bytes, tokenizer.decode(ids[1:])


@pytest.mark.parametrize(
    ("world_size", "ep", "micro_batch", "stage"),
    [
        (1, 1, 2, 1),
        (2, 2, 1, 3),
        (4, 2, 1, 1),
        (4, 4, 2, 3),
        *(
            pytest.param(*layout, marks=pytest.mark.full)
            for layout in [(1, 1, 2, 3), (2, 1, 2, 1), (2, 1, 2, 3), (2, 2, 1, 1), (4, 2, 1, 3), (4, 4, 2, 1)]
        ),
    ],
)
def test_evaluation_equals_plain_torch(pools, config, alone, world_size, ep, micro_batch, stage):
    """5 sequences divide among none of the layouts; nothing is dropped, though the model is trained so."""
    layout = {"ep": ep, "stage": stage, "micro_batch": micro_batch}
    answers = pools[world_size].run("tests.dist.test_evaluate:evaluate", config=config, **layout)
    assert len(set(answers)) == 1, "every rank has the same"
    loss, bpb, sample = answers[0]
    assert loss == pytest.approx(alone[0], rel=1e-6)
    assert bpb == pytest.approx(alone[1], rel=1e-6)
    assert sample == alone[2]
    assert sample.startswith("alpha")
    assert len(sample) > 10


def test_the_reference_would_see_dropping_and_the_bytes(config, alone):
    """Else the test above could not fail: dropped tokens change the loss, and no token is one byte."""
    model = DeepseekV2(config.model)
    init_weights(model, config.model.initializer_range, seed=0)
    packed = open_split(config.data.path, "validation", LENGTH, VOCABULARY)
    sequences = torch.from_numpy(packed.take(np.arange(SEQUENCES)))
    with torch.no_grad():
        dropped = model.train()(sequences[:, :-1], sequences[:, 1:], torch.arange(SEQUENCES)).lm_loss
    assert dropped.item() != pytest.approx(alone[0], rel=1e-4)
    assert alone[1] != pytest.approx(alone[0] / np.log(2), rel=0.1)
