"""Weights of a Hugging Face folder in our model: what is refused, and that a rank reads only its experts."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config

from dsv2.config.schema import ModelConfig, RopeScalingConfig
from dsv2.errors import UserError
from dsv2.hf import init_from as weights_module
from dsv2.hf.fields import compare_config, published_config
from dsv2.hf.init_from import INDEX, HFWeights
from dsv2.hf.names import published_parts
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.execution import Execution
from tests.unit.hf.folders import assert_same_weights, exported_folder, hf_tiny, our_model

CONFIG = hf_tiny()
GATE = "model.layers.1.mlp.experts.4.gate_proj.weight"
YARN = RopeScalingConfig()


def share(size: int, rank: int) -> DeepseekV2:
    ep: Any = SimpleNamespace(size=size, rank=rank)  # enough to build one rank's share of the experts
    model = DeepseekV2(CONFIG, Execution(ep))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of our_model(CONFIG), in several files."""
    return exported_folder(tmp_path, our_model(CONFIG), shard_gb=4e-5)


def file_of(folder: Path, name: str) -> str:
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def stacked(folder: Path) -> Path:
    """The same weights as transformers 5 keeps them, in one file without an index."""
    model = our_model(CONFIG)
    tensors = {p.name: v.detach()[p.indices] for _, v, parts in published_parts(model, True) for p in parts}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("make", [lambda folder: folder, stacked], ids=["by expert", "stacked"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_each_rank_reads_its_own_experts_and_all_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], ep_size: int
) -> None:
    weights = HFWeights(make(folder), CONFIG)
    whole = dict(our_model(CONFIG).named_parameters())
    numbers: list[int] = []

    class CountingSlice:
        def __init__(self, plain: Any):
            self.plain = plain

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor = self.plain[index]
            numbers.append(tensor.numel())
            return tensor

    class CountingFile:
        def __init__(self, path: Path, framework: str):
            self.plain = safe_open(path, framework)

        def __enter__(self) -> "CountingFile":
            self.plain.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.plain.__exit__(*error)

        def get_slice(self, name: str) -> CountingSlice:
            return CountingSlice(self.plain.get_slice(name))

    monkeypatch.setattr(weights_module, "safe_open", CountingFile)
    for rank in range(ep_size):
        numbers.clear()
        model = share(ep_size, rank)
        weights.fill(model)
        for name, parameter in model.named_parameters():
            expected = whole[name].chunk(ep_size)[rank] if ".experts.w" in name else whole[name]
            assert torch.equal(parameter, expected), name
        assert sum(numbers) == sum(parameter.numel() for parameter in model.parameters())


def test_another_dtype_is_cast(folder: Path) -> None:
    model = DeepseekV2(CONFIG).to(torch.bfloat16)
    HFWeights(folder, CONFIG).fill(model)
    assert_same_weights(model, our_model(CONFIG).to(torch.bfloat16))


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def edit_tensors(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the file that holds the tensor; the index stays."""
    path = folder / file_of(folder, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def name_outside(folder: Path, file: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], file)
    (folder / INDEX).write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    path = folder / file_of(folder, GATE)
    path.write_bytes(path.read_bytes()[:-1])


def lie_about_the_header(folder: Path) -> None:
    path = folder / file_of(folder, GATE)
    path.write_bytes(struct.pack("<Q", 10**15) + path.read_bytes()[8:])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing, so this"),
    "torn config": (lambda f: (f / "config.json").write_text('{"a'), r"config\.json cannot be read"),
    "list": (lambda f: (f / "config.json").write_text("[1]"), r"model_type=None, not deepseek_v2"),
    "llama": (lambda f: edit_config(f, model_type="llama"), r"model_type=llama, not deepseek_v2"),
    "file outside": (
        lambda f: name_outside(f, "../model.safetensors"),
        r"index\.json names a file outside: \.\.",
    ),
    "file by its path": (lambda f: name_outside(f, "/etc/passwd"), r"index\.json names a file outside: /etc"),
    "file without a name": (lambda f: name_outside(f, 3), r"index\.json names a file outside: 3"),
    "strange rope": (lambda f: edit_config(f, rope_scaling=[1]), r"config\.json has rope_scaling=\[1\]"),
    "torn index": (lambda f: (f / INDEX).write_text("{}"), r"index\.json cannot be read"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], r"model\.safetensors is missing"),
    "missing shard": (
        lambda f: (f / "model-00002-of-00004.safetensors").unlink(),
        r"model-00002-of-00004\.safetensors is missing",
    ),
    "truncated": (truncate, r"model-0000\d-of-00004\.safetensors cannot be read \(.+\)"),
    "bad header": (lie_about_the_header, r"model-0000\d-of-00004\.safetensors cannot be read \(.+\)"),
    "missing tensor": (
        lambda f: edit_tensors(f, GATE, lambda t: t.pop(GATE)),
        rf"no file has {GATE}, of shape \[7, 24\] in this run's model",
    ),
    "extra tensor": (
        lambda f: edit_tensors(f, GATE, lambda t: t.update({"model.layers.9.odd": torch.zeros(3)})),
        r"model\.layers\.9\.odd in model-0000\d-of-00004\.safetensors, of shape \[3\], is not part",
    ),
    "other shape": (
        lambda f: edit_tensors(f, GATE, lambda t: t.update({GATE: torch.zeros(24, 7)})),
        rf"{GATE} in model-0000\d-of-00004\.safetensors has the shape \[24, 7\], in this run's model \[7,",
    ),
    "integers": (
        lambda f: edit_tensors(f, GATE, lambda t: t.update({GATE: torch.zeros(7, 24, dtype=torch.int8)})),
        rf"{GATE} in model-0000\d-of-00004\.safetensors is of type I8, not one of F32, BF16, F16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused(folder: Path, case: str) -> None:
    assert len(list(folder.glob("*.safetensors"))) == 4
    spoil, said = BAD[case]
    spoil(folder)
    with pytest.raises(UserError, match=said) as refusal:
        HFWeights(folder, CONFIG)
    assert str(refusal.value).startswith(f"init_from={folder}: ")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"init_from=.*gone: there is no such folder"):
        HFWeights(tmp_path / "gone", CONFIG)


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("vocab_size", 102400),
        ("hidden_size", 48),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 6),
        ("num_key_value_heads", 1),
        ("q_lora_rank", None),
        ("kv_lora_rank", 512),
        ("qk_nope_head_dim", 128),
        ("qk_rope_head_dim", 64),
        ("v_head_dim", 128),
        ("intermediate_size", 1),
        ("moe_intermediate_size", 1),
        ("n_routed_experts", 160),
        ("n_shared_experts", 1),
        ("num_experts_per_tok", 6),
        ("n_group", 6),
        ("topk_group", 3),
        ("topk_method", "greedy"),
        ("topk_method", "noaux_tc"),
        ("first_k_dense_replace", 0),
        ("routed_scaling_factor", 16.0),
        ("rms_norm_eps", 1e-5),
        ("rope_theta", 50000.0),
        ("scoring_func", "sigmoid"),
        ("norm_topk_prob", True),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", 2),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", True),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_another_configuration_is_refused_by_its_field(field: str, theirs: Any) -> None:
    content = published_config(CONFIG, 1, 2, "float32")
    compare_config(content, CONFIG, Path("there"))
    ours = content.get(field)
    with pytest.raises(UserError) as refusal:
        compare_config(content | {field: theirs}, CONFIG, Path("there"))
    assert str(refusal.value) == (
        f"init_from=there: config.json has {field}={theirs}, this run's model {field}={ours}"
    )


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0},
        {"type": "linear", "factor": 40},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    ],
)
def test_another_rope_is_refused(scaling: dict[str, Any] | None) -> None:
    content = published_config(hf_tiny(rope_scaling=YARN), 1, 2, "float32") | {"rope_scaling": scaling}
    with pytest.raises(UserError, match=r"config\.json has rope_scaling=.*, this run's .* rope_scaling=.*40"):
        compare_config(content, hf_tiny(rope_scaling=YARN), Path("there"))
    if scaling:
        with pytest.raises(UserError, match=r"has rope_scaling=.*, this run's model rope_scaling=None"):
            compare_config(content, CONFIG, Path("there"))


@pytest.mark.parametrize("config", [CONFIG, hf_tiny(rope_scaling=YARN), hf_tiny(n_group=1, topk_group=1)])
def test_what_transformers_makes_of_it_fits_too(config: ModelConfig, tmp_path: Path) -> None:
    """It keeps RoPE's parameters in one place of its own, and drops what it does not know."""
    DeepseekV2Config(**published_config(config, 1, 2, "float32")).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" in content["rope_parameters"]
    compare_config(content, config, tmp_path)


def test_published_weights_are_of_latent_attention() -> None:
    content = published_config(CONFIG, 1, 2, "float32")
    other = replace(CONFIG, attention="mha")
    with pytest.raises(UserError, match=r"model\.attention=mha: must be mla"):
        compare_config(content, other, Path("there"))


def test_plain_top_k_needs_no_groups() -> None:
    config = hf_tiny(n_group=1, topk_group=1)
    content = published_config(config, 1, 2, "float32")
    compare_config(content | {"n_group": None, "topk_group": None}, config, Path("there"))
    with pytest.raises(UserError, match="n_group=None"):
        compare_config(published_config(CONFIG, 1, 2, "float32") | {"n_group": None}, CONFIG, Path("there"))
