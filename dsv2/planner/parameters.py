"""The tensors of the model that one rank holds, by optimizer group, from the sizes alone.

The groups are those of `Optimizer.groups` in dsv2/optimizers/base.py; a test compares both with the
built model.
"""

from dsv2.config.schema import AttentionKind, ModelConfig
from dsv2.model.sizes import key_value_heads
from dsv2.optimizers.base import GroupSizes, RankParameters


def _attention(m: ModelConfig) -> list[int]:
    """Matrices of one layer's attention."""
    heads = m.num_attention_heads
    if m.attention is not AttentionKind.mla:
        query, key = (m.hidden_size * m.qk_nope_head_dim * n for n in (heads, key_value_heads(m)))
        return [query, key, key, query]
    q_width = heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    if m.q_lora_rank is None:
        query = [m.hidden_size * q_width]
    else:
        query = [m.hidden_size * m.q_lora_rank, m.q_lora_rank * q_width]
    return [
        *query,
        m.hidden_size * (m.kv_lora_rank + m.qk_rope_head_dim),
        m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim),
        heads * m.v_head_dim * m.hidden_size,
    ]


def rank_parameters(m: ModelConfig, world_size: int, ep_size: int) -> RankParameters:
    """One rank's tensors; every rank's are alike."""
    dense_layers = min(m.first_k_dense_replace, m.num_hidden_layers)
    moe_layers = m.num_hidden_layers - dense_layers
    embedding = m.vocab_size * m.hidden_size
    matrices = [embedding, *_attention(m) * m.num_hidden_layers, embedding]
    matrices += [m.hidden_size * m.intermediate_size] * (3 * dense_layers)
    matrices += [m.n_routed_experts * m.hidden_size] * moe_layers
    if m.n_shared_experts:
        matrices += [m.hidden_size * m.n_shared_experts * m.moe_intermediate_size] * (3 * moe_layers)
    latents = []
    if m.attention is AttentionKind.mla:
        latents = [m.kv_lora_rank, *([] if m.q_lora_rank is None else [m.q_lora_rank])]
    norms = [m.hidden_size, m.hidden_size, *latents] * m.num_hidden_layers + [m.hidden_size]
    w2 = m.n_routed_experts // ep_size * m.hidden_size * m.moe_intermediate_size
    return RankParameters(
        decay=GroupSizes(matrices, world_size),
        no_decay=GroupSizes(norms, world_size),
        experts=GroupSizes([2 * w2, w2] * moe_layers, world_size // ep_size),
    )
