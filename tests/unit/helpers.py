"""What several test files share: property settings and configurations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import settings

from dsv2.compose import compose_overrides, to_config
from dsv2.config import BalanceConfig, Config, ModelConfig

REPO = Path(__file__).parents[2]

# No deadline: the machine is shared. Derandomized: a commit must not fail by luck.
properties = settings(max_examples=30, deadline=None, derandomize=True)


def tiny_config(**changes: Any) -> ModelConfig:
    """Everything on, every size different, and small enough for loops in Python."""
    config = ModelConfig(
        vocab_size=31,
        hidden_size=20,
        num_hidden_layers=3,
        num_attention_heads=3,
        q_lora_rank=14,
        kv_lora_rank=10,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=5,
        intermediate_size=22,
        moe_intermediate_size=7,
        n_routed_experts=12,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        balance=BalanceConfig(alpha_expert=0.3, alpha_device=0.5, alpha_comm=0.7),
    )
    return replace(config, **changes)


def compose_config(*overrides: str) -> Config:
    """The shipped configuration under these overrides."""
    return to_config(compose_overrides(list(overrides)))
