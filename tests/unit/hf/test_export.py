"""The exported folder: what it holds, who can read it, and that it is whole or absent."""

import json
import re
import resource
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2ForCausalLM

from data.tokenizers.load import load_tokenizer
from data.tokenizers.train import train_tokenizer
from dsv2.checkpoint.reader import CheckpointReader
from dsv2.config.schema import ModelConfig, RopeScalingConfig
from dsv2.hf import export as export_module
from dsv2.hf.export import export, plan_shards
from dsv2.hf.init_from import HFWeights
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from tests.unit.data.tokenizers.texts import SENTENCES
from tests.unit.helpers import REPO, run_verb
from tests.unit.hf.folders import (
    TOKENIZER_PIECES,
    assert_same_weights,
    exported_folder,
    hf_tiny,
    our_model,
    published_checkpoint,
)

YARN = RopeScalingConfig()
KEPT_IN_BF16 = "model.layers.1.mlp.experts.3.up_proj.weight"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def filled(folder: Path, config: ModelConfig) -> DeepseekV2:
    """Our model with the folder's weights."""
    model = DeepseekV2(config)
    init_weights(model, std=9.0, seed=9)  # a parameter that is not filled shows
    HFWeights(folder, config).fill(model)
    return model


CHANGES = [{}, {"q_lora_rank": None, "rope_scaling": YARN}, {"n_group": 4, "topk_group": 4}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_transformers_loads_it_and_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = our_model(hf_tiny(**changes)).eval()
    folder = exported_folder(tmp_path, model, shard_gb=2e-5)
    theirs, info = DeepseekV2ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert theirs.dtype == torch.float32
    theirs.config._experts_implementation = "eager"
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        logits = theirs(ids).logits
        ours = model(ids, None, torch.zeros(1, dtype=torch.long))
    assert float((ours - logits).abs().max() / logits.abs().max()) < 1e-5


def test_it_generates(tmp_path: Path) -> None:
    """With widths that the default kernels take, in bf16, by the Auto classes: as a user would."""
    model = our_model(hf_tiny(moe_intermediate_size=8))
    folder = exported_folder(tmp_path, model, dtype="bf16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(theirs, DeepseekV2ForCausalLM)
    assert theirs.dtype == torch.bfloat16
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)
    inputs = tokenizer("def take(self)", return_tensors="pt")
    out = theirs.generate(**inputs, max_new_tokens=5, do_sample=False)[0]
    assert out[0] == tokenizer.bos_token_id
    assert tokenizer.decode(out, skip_special_tokens=True).startswith("def take(self)")
    assert inputs.input_ids.shape[1] < len(out) <= inputs.input_ids.shape[1] + 5
    prompts = ["def take(self)", "def"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    rows = theirs.generate(**batch, max_new_tokens=5, do_sample=False)
    for prompt, text in zip(prompts, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True):
        assert text.startswith(prompt)


def test_names_shards_and_index(tmp_path: Path) -> None:
    model = our_model(hf_tiny())
    folder = exported_folder(tmp_path, model, shard_gb=4e-5)  # 40 KB
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {n for n, f in index["weight_map"].items() if f == file} == set(opened.keys())
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
            assert sum(sizes) <= 40_000
    tensors = tensors_of(folder)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert tensors["model.layers.2.mlp.experts.11.down_proj.weight"].shape == (24, 7)
    expected = model.decoder_layers()[2].mlp.experts.w13[11]
    assert torch.equal(tensors["model.layers.2.mlp.experts.11.gate_proj.weight"], expected[:7])
    assert torch.equal(tensors["model.layers.2.mlp.experts.11.up_proj.weight"], expected[7:])
    assert not any(".w13" in name or ".w2" in name for name in tensors)
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "who may read one file may read all"


def test_plan_of_shards() -> None:
    sizes = {"a": 4, "b": 6, "c": 1, "d": 30, "e": 2, "f": 8}
    assert plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert plan_shards(sizes, 100) == [list(sizes)]


def test_round_trip_in_fp32_is_bitwise(tmp_path: Path) -> None:
    model = our_model(hf_tiny())
    assert_same_weights(filled(exported_folder(tmp_path, model), model.config), model)


def test_without_a_group_limit_it_routes_the_same_in_any_groups(tmp_path: Path) -> None:
    model = our_model(hf_tiny(n_group=4, topk_group=4)).eval()
    folder = exported_folder(tmp_path, model)
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        logits = model(ids, None, torch.zeros(1, dtype=torch.long))
        for groups in (1, 2, 4):
            again = filled(folder, hf_tiny(n_group=groups, topk_group=groups)).eval()
            assert torch.equal(again(ids, None, torch.zeros(1, dtype=torch.long)), logits)


def test_round_trip_in_bf16_is_bitwise_for_bf16_weights(tmp_path: Path) -> None:
    """And other weights are rounded to the nearest."""
    model = our_model(hf_tiny())
    rounded = exported_folder(tmp_path / "a", model, dtype="bf16")
    exact = our_model(hf_tiny()).bfloat16().float()
    assert_same_weights(filled(rounded, model.config), exact)
    folder = exported_folder(tmp_path / "b", exact, dtype="bf16")
    assert tensors_of(folder)[KEPT_IN_BF16].dtype == torch.bfloat16
    assert_same_weights(filled(folder, model.config), exact)
    again = exported_folder(tmp_path / "c", filled(folder, model.config), dtype="bf16")
    for file in sorted(path.name for path in folder.iterdir()):
        assert (folder / file).read_bytes() == (again / file).read_bytes(), file


@pytest.mark.parametrize("original_format", [True, False], ids=["by expert", "stacked"])
def test_what_transformers_saves_comes_back_bitwise(tmp_path: Path, original_format: bool) -> None:
    model = our_model(hf_tiny(rope_scaling=YARN))
    theirs = DeepseekV2ForCausalLM.from_pretrained(exported_folder(tmp_path, model))
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=original_format)
    stacked = "model.layers.1.mlp.experts.gate_up_proj" in tensors_of(tmp_path / "theirs")
    assert stacked != original_format
    assert_same_weights(filled(tmp_path / "theirs", model.config), model)


@pytest.mark.parametrize(
    ("scaling", "options", "positions"),
    [
        (None, {}, 256),
        (None, {"max_position_embeddings": 512}, 512),
        (YARN, {}, 163840),
        (YARN, {"max_position_embeddings": 32768}, 32768),
    ],
)
def test_config_promises_the_positions_that_work(
    tmp_path: Path, scaling: RopeScalingConfig | None, options: dict[str, Any], positions: int
) -> None:
    """The run's sequences have 256 tokens, and its model allows 163840; `init_from` accepts any length."""
    model = our_model(hf_tiny(rope_scaling=scaling))
    folder = exported_folder(tmp_path, model, **options)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == positions
    assert AutoTokenizer.from_pretrained(folder).model_max_length == positions
    assert_same_weights(filled(folder, model.config), model)


def test_a_run_means_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    older, newer = our_model(hf_tiny()), our_model(hf_tiny())
    with torch.no_grad():
        newer.lm_head.weight.add_(1)
    published_checkpoint(tmp_path / "run" / "checkpoints", older, step=3)
    newest = published_checkpoint(tmp_path / "run" / "checkpoints", newer, step=12)
    export(tmp_path / "run", tmp_path / "a", "fp32")
    assert_same_weights(filled(tmp_path / "a", newer.config), newer)
    (newest / "__0_0.distcp").unlink()
    export(tmp_path / "run", tmp_path / "b", "fp32")
    assert_same_weights(filled(tmp_path / "b", newer.config), older)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which the command line refuses, and exits with 2."""
    assert run_verb("export", *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = published_checkpoint(tmp_path / "saved", our_model(hf_tiny())), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "no state.json; it is no dsv2 checkpoint" in refused(capsys, tmp_path / "empty", out)
    assert "there is no such folder" in refused(capsys, tmp_path / "nowhere", out)
    assert "--shard-gb 0.0: must be above 0" in refused(capsys, path, out, "--shard-gb", "0")
    said = refused(capsys, path, out, "--max-position-embeddings", "0")
    assert "model.max_position_embeddings=0: must be" in said
    assert f"out={tmp_path / 'saved'}: already exists" in refused(capsys, path, tmp_path / "saved")
    tokenizer = tmp_path / "saved" / "tokenizer.model"
    train_tokenizer(SENTENCES * 5, 340, tmp_path / "large.model")
    said = refused(capsys, path, out, "--tokenizer", tmp_path / "large.model")
    assert "large.model: has 340 pieces, and the model's vocab_size is 324" in said
    tokenizer.rename(tmp_path / "moved.model")
    said = refused(capsys, path, out)
    assert f"there is no file {tokenizer}; --tokenizer FILE names the one" in said
    assert not out.exists()
    assert run_verb("export", path, str(out), "--tokenizer", str(tmp_path / "moved.model")) == 0
    assert load_tokenizer(out / "tokenizer.json").vocab_size == TOKENIZER_PIECES
    shutil.rmtree(out)
    data = path / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    assert re.search(r"__0_0.distcp has \d+ bytes of \d+", refused(capsys, path, out))
    data.unlink()
    assert "__0_0.distcp is missing; use an older checkpoint" in refused(capsys, path, out)
    data.write_bytes(bytes(len(whole)))
    said = refused(capsys, path, out, "--tokenizer", tmp_path / "moved.model")
    assert "__0_0.distcp does not hold what was written" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "large.model", "moved.model", "saved"]


def test_cut_short_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C it leaves nothing; what a killed one left behind does not disturb the next."""
    path, out = published_checkpoint(tmp_path / "saved", our_model(hf_tiny())), tmp_path / "out"
    partial = tmp_path / "out.partial"
    plain, asked = CheckpointReader.tensor, []

    def interrupted(self: CheckpointReader, name: str, numel: int) -> torch.Tensor:
        asked.append(name)
        if len(asked) == 40:
            assert len(list(partial.glob("*.safetensors"))) > 1
            shutil.copytree(partial, tmp_path / "left")
            raise KeyboardInterrupt
        return plain(self, name, numel)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointReader, "tensor", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(path, out, shard_gb=2e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["left", "saved"]
    (tmp_path / "left" / "model-00001-of-00099.safetensors").touch()
    (tmp_path / "left").rename(partial)
    export(path, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "saved"]
    assert [p.name for p in out.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]


def test_a_full_disk(tmp_path: Path) -> None:
    """The kernel lets no file grow beyond 40 KB: one message, exit code 1, and nothing is left."""
    path, out = published_checkpoint(tmp_path / "saved", our_model(hf_tiny())), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "dsv2", "export", path, out],
        cwd=REPO,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"error: {out} could not be written: ")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


class Ledger:
    """Bytes that are alive."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, size: int, holder: object) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(holder, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


def test_memory_holds_a_shard_and_a_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is read or made is counted while it lives; the model is many times that."""
    model, limit = our_model(hf_tiny(num_hidden_layers=12)), 30_000
    path, ledger = published_checkpoint(tmp_path / "saved", model), Ledger()
    plain_read, plain_tensors = CheckpointReader.tensor, export_module.published_tensors

    def read(self: CheckpointReader, name: str, numel: int) -> torch.Tensor:
        array = plain_read(self, name, numel).numpy().copy()
        ledger.add(array.nbytes, array)
        return torch.from_numpy(array)  # whose memory lives as long as any view of it

    def tensors(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in plain_tensors(*arguments):
            ledger.add(tensor.nbytes, tensor)
            yield name, tensor

    monkeypatch.setattr(CheckpointReader, "tensor", read)
    monkeypatch.setattr(export_module, "published_tensors", tensors)
    export(path, tmp_path / "out", "fp32", shard_gb=limit / 1e9)
    largest = max(parameter.nbytes for parameter in model.parameters())
    # The embedding is larger than the limit: it is a shard of its own, and beside it stands its source.
    assert limit < ledger.peak <= 2 * max(limit, largest)
    assert sum(parameter.nbytes for parameter in model.parameters()) > 7 * ledger.peak
    assert_same_weights(filled(tmp_path / "out", model.config), model)
