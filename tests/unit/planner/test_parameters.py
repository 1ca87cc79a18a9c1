"""The planner's lists of tensors against the built model's."""

from dataclasses import replace

import pytest
import torch

from dsv2.model.sizes import count_parameters
from dsv2.model.transformer import DeepseekV2
from dsv2.parallel.plan import ParallelPlan
from dsv2.planner.parameters import rank_parameters
from tests.unit.helpers import compose_config, tiny_config

HEADS = {"num_attention_heads": 6, "v_head_dim": 8}
MODELS = {
    "v2": compose_config("model=v2").model,
    "lite": compose_config("model=lite").model,
    "debug": compose_config("model=debug").model,
    "tiny": tiny_config(),
    "mha": tiny_config(attention="mha", **HEADS),
    "gqa": tiny_config(attention="gqa", num_key_value_heads=2, **HEADS),
    "mqa": tiny_config(attention="mqa", **HEADS),
    "no shared experts, no dense layer": tiny_config(n_shared_experts=0, first_k_dense_replace=0),
    "two dense layers": tiny_config(q_lora_rank=None, first_k_dense_replace=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_in_its_group(name):
    with torch.device("meta"):
        model = DeepseekV2(MODELS[name])
    decay, no_decay, experts = [], [], []
    for parameter_name, p in model.named_parameters():
        group = experts if ".experts." in parameter_name else (decay if p.ndim > 1 else no_decay)
        group.append(p.numel())
    groups = rank_parameters(MODELS[name], ParallelPlan(world=1, ep=1))
    assert [sorted(g.sizes) for g in groups] == [sorted(decay), sorted(no_decay), sorted(experts)]
    assert groups.elements == count_parameters(MODELS[name]).total


@pytest.mark.parametrize("ep", [2, 4])
def test_expert_parallelism_cuts_the_experts_alone(ep):
    whole = rank_parameters(MODELS["tiny"], ParallelPlan(world=8, ep=1))
    cut = rank_parameters(MODELS["tiny"], ParallelPlan(world=8, ep=ep))
    assert cut.decay == whole.decay
    assert cut.no_decay == whole.no_decay
    assert cut.experts.sizes == [size // ep for size in whole.experts.sizes]
    assert [group.copies for group in cut] == [8, 8, 8 // ep]


def test_of_the_experts_a_layer_s_two_tensors_stand_together():
    """What ZeRO-3 gathers at once is read off the first two."""
    model = replace(MODELS["tiny"], num_hidden_layers=5)
    sizes = rank_parameters(model, ParallelPlan(world=1, ep=1)).experts.sizes
    assert len(sizes) == 2 * 4
    assert sum(sizes[:2]) == 12 * 3 * 20 * 7
