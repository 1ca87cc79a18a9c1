"""The kinds of attention behind one signature: `forward` for whole sequences, `cached` and `decode` for
one token after another (see dsv2/inference/decode.py)."""

from dsv2.config.schema import AttentionKind, ModelConfig
from dsv2.kernels.sets import REFERENCE, KernelSet
from dsv2.model.attention.grouped_module import GroupedQueryAttention
from dsv2.model.attention.mla_module import MultiHeadLatentAttention

Attention = MultiHeadLatentAttention | GroupedQueryAttention


def build_attention(config: ModelConfig, kernels: KernelSet = REFERENCE) -> Attention:
    if config.attention is AttentionKind.mla:
        return MultiHeadLatentAttention(config, kernels)
    return GroupedQueryAttention(config)


def rotary_width(config: ModelConfig) -> int:
    """Dimensions of a head that RoPE turns: MLA's decoupled ones, else all."""
    return config.qk_rope_head_dim if config.attention is AttentionKind.mla else config.qk_nope_head_dim
