"""lm-evaluation-harness on an exported folder, against our model on the same tokens. `make harness` runs it.

The harness has its own environment, .venv-harness, because it brings many packages. It reads one local file
and no network. Without that environment the test fails. Without `-m harness` pytest does not select it.
"""

import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from dsv2.hf.init_from import HFWeights
from dsv2.model.transformer import DeepseekV2
from tests.unit.data.tokenizers.texts import SENTENCES
from tests.unit.helpers import REPO
from tests.unit.hf.folders import exported_folder, hf_tiny, our_model

HARNESS = REPO / ".venv-harness/bin/python"
WINDOW = 40  # positions; every document but one needs several windows
# Relative, of a sum of hundreds of fp32 losses. A token more, less or other changes the sum by 1e-3.
ROUNDING = 1e-6
DOCUMENTS = ["A short one: naïve, 日本.\n", *SENTENCES, " ".join(SENTENCES)]
TASK = """
task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {texts}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: word_perplexity
"""


def harness(exported: Path, folder: Path, *model_args: str) -> dict[str, float]:
    """Return the harness's figures for the task in `folder`."""
    assert HARNESS.exists(), f"{HARNESS}: no such file; run `make harness`, which installs the harness"
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    command = [HARNESS, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--tasks", "local_text"]
    command += ["--model_args", ",".join([f"pretrained={exported}", "dtype=float32", *model_args])]
    command += ["--include_path", folder, "--output_path", folder / "results.json"]
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **offline, "HF_HOME": str(folder / "cache")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = folder.glob("results*.json")
    found: dict[str, Any] = json.loads(results.read_text())["results"]["local_text"]
    results.unlink()
    return {name.removesuffix(",none"): value for name, value in found.items() if name.endswith(",none")}


def nats(model: DeepseekV2, tokens: list[int], bos_id: int) -> float:
    """Return the sum of our losses of `tokens`, each predicted after at most WINDOW tokens, bos the first."""
    inputs = [bos_id, *tokens]
    total = 0.0
    for begin in range(0, len(tokens), WINDOW):
        end = min(begin + WINDOW, len(tokens))
        first = max(0, end - WINDOW)  # the last window is as long as the others, but counts its new tokens
        logits = model(torch.tensor([inputs[first:end]]), None, torch.zeros(1, dtype=torch.long))[0]
        labels = torch.tensor(tokens[begin:end])
        losses = torch.nn.functional.cross_entropy(logits[begin - first :], labels, reduction="none")
        total += float(losses.double().sum())
    return total


def our_figures(model: DeepseekV2, tokenizer: Tokenizer, bos_twice: bool) -> dict[str, float]:
    """Return bits per UTF-8 byte and nats per word of all documents together."""
    again = [tokenizer.bos_id] if bos_twice else []
    with torch.no_grad():
        total = sum(nats(model, [*again, *tokenizer.encode(text)], tokenizer.bos_id) for text in DOCUMENTS)
    n_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    n_words = sum(len(re.split(r"\s+", text)) for text in DOCUMENTS)  # as the harness counts them
    return {"bits_per_byte": total / n_bytes / math.log(2), "nats_per_word": total / n_words}


@pytest.mark.harness
@pytest.mark.timeout(2000)  # two starts of the harness: 35 s of CPU each, and minutes on a busy machine
def test_the_harness_computes_our_loss_on_the_same_tokens(tmp_path: Path) -> None:
    """With its own settings it predicts a second bos; without the tokenizer's bos, the text alone."""
    config = hf_tiny(moe_intermediate_size=8)  # the default expert kernels want multiples of 4
    exported = exported_folder(tmp_path, our_model(config), max_position_embeddings=WINDOW)
    model = DeepseekV2(config).eval()
    HFWeights(exported, config).fill(model)
    tokenizer = load_tokenizer(exported / "tokenizer.json")
    assert sum(len(tokenizer.encode(text)) > WINDOW for text in DOCUMENTS) == len(DOCUMENTS) - 1
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (tmp_path / "local_text.yaml").write_text(TASK.format(texts=texts))
    bits = {}
    for bos_twice, model_args in ((False, ["add_bos_token=False"]), (True, [])):
        theirs = harness(exported, tmp_path, *model_args)
        ours = our_figures(model, tokenizer, bos_twice)
        print(f"bos twice: {bos_twice}; harness {theirs}; dsv2 {ours}")
        assert theirs["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=ROUNDING)
        assert math.log(theirs["word_perplexity"]) == pytest.approx(ours["nats_per_word"], rel=ROUNDING)
        bits[bos_twice] = theirs["bits_per_byte"]
    assert abs(bits[True] / bits[False] - 1) > 1e-3, "a second bos shows"
