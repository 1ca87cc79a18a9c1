"""Counts of parameters and FLOPs against the modules themselves and the published figures."""

from dataclasses import replace

import pytest
import torch

from dsv2.config.schema import ModelConfig
from dsv2.model.sizes import count_parameters, flops_per_token
from dsv2.model.transformer import DeepseekV2
from dsv2.parallel.gpus import peak_flops
from tests.unit.helpers import KINDS, compose_config, tiny_config


def preset(name: str) -> ModelConfig:
    return compose_config(f"model={name}").model


def counted(config: ModelConfig) -> tuple[int, int, int]:
    """(total, active, active in matrix products) from the modules, without memory for their weights."""
    with torch.device("meta"):
        model = DeepseekV2(config)
    total = unused = norms = 0
    for name, p in model.named_parameters():
        total += p.numel()
        norms += p.numel() if p.ndim == 1 else 0
        if ".experts." in name:
            unused += (config.n_routed_experts - config.num_experts_per_tok) * p[0].numel()
    active = total - unused
    return total, active, active - norms - model.model.embed_tokens.weight.numel()


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(q_lora_rank=None),
        tiny_config(n_shared_experts=0, first_k_dense_replace=0),
        tiny_config(first_k_dense_replace=2, v_head_dim=9),
        *(tiny_config(**KINDS[kind]) for kind in ("mha", "gqa", "mqa")),
    ],
)
def test_counts_are_those_of_the_modules(config):
    assert tuple(count_parameters(config)) == counted(config)


@pytest.mark.parametrize(
    ("name", "total", "active"), [("lite", 15.706e9, 2.661e9), ("v2", 235.741e9, 21.376e9)]
)
def test_published_sizes(name, total, active):
    """To the million, as published."""
    counts = counted(preset(name))
    assert tuple(count_parameters(preset(name))) == counts
    assert counts[:2] == pytest.approx((total, active), abs=0.5e6)


@pytest.mark.parametrize(("name", "total", "active"), [("debug", 5.1e6, 3.1e6), ("small", 100e6, None)])
def test_sizes_in_the_presets_own_comments(name, total, active):
    counts = counted(preset(name))
    assert tuple(count_parameters(preset(name))) == counts
    if active is None:
        assert counts[0] == pytest.approx(total, rel=0.1), "about"
    else:
        assert counts[:2] == pytest.approx((total, active), abs=0.05e6)


@pytest.mark.parametrize(
    ("kind", "heads", "key_width", "value_width"),
    [("mla", 3, 8 + 6, 5), ("mha", 3, 8, 8), ("gqa", 6, 8, 8), ("mqa", 3, 8, 8)],
)
def test_training_flops_of_one_token(kind, heads, key_width, value_width):
    """6 a weight, and by the position: a token at 0-based t has t + 1/2 keys if half its own counts."""
    config, length = tiny_config(**KINDS[kind]), 16
    *_, matmul = counted(config)
    attention = 0.0
    for _layer in range(3):
        for _head in range(heads):
            for t in range(length):
                scores = 2 * key_width * (t + 0.5)
                values = 2 * value_width * (t + 0.5)
                attention += 3 * (scores + values)  # backward costs twice the forward
    assert flops_per_token(config, length) == 6 * matmul + attention / length


def test_eight_layers_of_lite():
    slice_of_lite = replace(preset("lite"), num_hidden_layers=8)
    assert flops_per_token(slice_of_lite, 4096) == pytest.approx(5.738e9, abs=0.5e6)


def test_published_utilisation_of_v2():
    """172.8K H800 hours a trillion tokens: 1608 tokens/s a GPU, about 25 %."""
    peak = peak_flops("NVIDIA H800")
    assert peak == 989e12
    tokens_per_second = 1e12 / (172.8e3 * 3600)
    assert tokens_per_second == pytest.approx(1608, abs=1)
    assert tokens_per_second * flops_per_token(preset("v2"), 4096) / peak == pytest.approx(0.25, abs=0.01)
