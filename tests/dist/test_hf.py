"""Hugging Face folders and layouts: exported from any, and the start of a run on any."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from dsv2.hf.export import export
from dsv2.hf.init_from import HFWeights
from dsv2.model.transformer import DeepseekV2
from tests.dist import jobs, traces

STEPS = 3


def _small_tokenizer(path: Path) -> Path:
    """A tokenizer.json of no more pieces than the jobs' model has."""
    made = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "a": 2}, merges=[], byte_fallback=True))
    made.decoder = decoders.ByteFallback()
    made.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    made.save(str(path))
    return path


def _trained_and_exported(
    pools: Any, folder: Path, world_size: int, **layout: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    """The exported folder and the trained fp32 weights."""
    results = pools[world_size].run(
        "tests.dist.jobs:train_and_save", folder=str(folder), save_at=STEPS, steps=STEPS, **layout
    )
    tokenizer = _small_tokenizer(folder / "tokenizer.json")
    export(folder / f"step-{STEPS:08d}", folder / "out", "fp32", shard_gb=1e-5, tokenizer=str(tokenizer))
    return folder / "out", traces.whole([result[1] for result in results])


@pytest.mark.parametrize(
    ("world_size", "ep", "stage", "bf16"),
    [(1, 1, 0, False), (2, 2, 1, True), (4, 2, 2, False), (4, 4, 3, False)],
)
def test_export_from_any_layout(pools, tmp_path, world_size, ep, stage, bf16):
    """To the bit, and under bf16 the fp32 masters."""
    folder, trained = _trained_and_exported(
        pools, tmp_path, world_size, ep=ep, stage=stage, micro_batch=2, bf16=bf16
    )
    model = DeepseekV2(jobs.model_config())
    HFWeights(folder, model.config).fill(model)
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().flatten().numpy(), trained.pop(name)), name
    assert not trained, "nothing is left out"


def test_start_on_any_layout(pools, tmp_path):
    """Two processes that start from a folder train as one process of plain torch that does."""
    folder, _ = _trained_and_exported(pools, tmp_path, 2, ep=2, stage=1, micro_batch=2)
    want, fresh = jobs.reference(STEPS, init_from=str(folder)), jobs.reference(STEPS)
    assert want.losses[0] < fresh.losses[0] - 0.01, "the folder's weights are trained ones"
    for ep, stage in ((2, 1), (2, 3), (1, 2), (1, 0)):
        results = pools[2].run(
            "tests.dist.jobs:train", steps=STEPS, init_from=str(folder), ep=ep, stage=stage, micro_batch=2
        )
        traces.assert_same(traces.assemble(results), want)
