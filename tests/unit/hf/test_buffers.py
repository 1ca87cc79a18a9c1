"""A router's buffer in a Hugging Face folder: exported in its own precision, and read by init_from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dsv2.errors import UserError
from dsv2.hf.init_from import INDEX, HFWeights
from dsv2.moe.layer import MoELayer
from tests.dist.test_buffers import CountingGate, counting
from tests.unit.hf.folders import exported_folder, hf_tiny, our_model

CONFIG = hf_tiny()


def gates(model: torch.nn.Module) -> dict[str, CountingGate]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CountingGate)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bf16 folder of a model with buffers that bf16 would round."""
    monkeypatch.setattr("dsv2.model.block.MoELayer", counting(MoELayer))
    model = our_model(CONFIG)
    for index, gate in enumerate(gates(model).values()):
        gate.load_E += torch.arange(CONFIG.n_routed_experts) + 1001.5 * (index + 1)
    return exported_folder(tmp_path, model, dtype="bf16")


def test_exported_whole_and_read_by_init_from(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    model = our_model(CONFIG)
    HFWeights(folder, CONFIG).fill(model)
    assert gates(model)
    for index, (name, gate) in enumerate(gates(model).items()):
        want = torch.arange(CONFIG.n_routed_experts) + 1001.5 * (index + 1)
        with safe_open(folder / weight_map[f"{name}.load_E"], "pt") as opened:
            assert torch.equal(opened.get_tensor(f"{name}.load_E"), want)
        assert torch.equal(gate.load_E, want)
        assert f"{name}.scratch" not in weight_map
        assert weight_map[f"{name}.start_2"]


def test_a_folder_without_the_buffer_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv2.model.block.MoELayer", MoELayer)
    plain = exported_folder(tmp_path / "plain", our_model(CONFIG))
    monkeypatch.setattr("dsv2.model.block.MoELayer", counting(MoELayer))
    with pytest.raises(UserError, match=r"no file has model\.layers\.\d+\.mlp\.gate\.load_E"):
        HFWeights(plain, CONFIG)
