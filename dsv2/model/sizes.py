"""Counts of parameters and floating-point operations, from the sizes alone.

The definitions are those used for published figures: a token's training FLOPs are 6 for every active
matrix weight (the input embedding is a look-up and counts nothing) plus causal attention.
"""

from typing import NamedTuple

from dsv2.config.schema import AttentionKind, ModelConfig


class ParameterCount(NamedTuple):
    total: int
    active: int  # of one token, both embeddings counted
    active_matmul: int  # of one token: matrices it is multiplied with (no input embedding, no norms)


def key_value_heads(config: ModelConfig) -> int:
    """Heads of keys and values that attention other than MLA has."""
    if config.attention is AttentionKind.gqa:
        assert config.num_key_value_heads is not None, "validate() checks this"
        return config.num_key_value_heads
    return 1 if config.attention is AttentionKind.mqa else config.num_attention_heads


def attention_matrices(config: ModelConfig) -> int:
    """Parameters of one layer's attention, its norms not counted."""
    heads = config.num_attention_heads
    if config.attention is not AttentionKind.mla:  # queries and output; keys and values
        return 2 * config.hidden_size * config.qk_nope_head_dim * (heads + key_value_heads(config))
    q_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.q_lora_rank is None:
        query = config.hidden_size * q_width
    else:
        query = (config.hidden_size + q_width) * config.q_lora_rank
    key_value = config.hidden_size * (config.kv_lora_rank + config.qk_rope_head_dim)
    up = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return query + key_value + up + heads * config.v_head_dim * config.hidden_size


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters in total and of one token."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    dense_layers = min(config.first_k_dense_replace, layers)
    moe_layers = layers - dense_layers
    expert = 3 * hidden * config.moe_intermediate_size
    head = config.vocab_size * hidden
    latent_norms = config.kv_lora_rank + (config.q_lora_rank or 0)
    norms = layers * (2 * hidden + (latent_norms if config.attention is AttentionKind.mla else 0)) + hidden
    always = (
        layers * attention_matrices(config)
        + dense_layers * 3 * hidden * config.intermediate_size
        + moe_layers * (config.n_shared_experts * expert + config.n_routed_experts * hidden)
        + head
    )
    matmul = always + moe_layers * config.num_experts_per_tok * expert
    return ParameterCount(
        total=always + moe_layers * config.n_routed_experts * expert + head + norms,
        active=matmul + head + norms,
        active_matmul=matmul,
    )


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Training FLOPs (forward and backward) of one token at this length, recomputation not counted."""
    head_width = config.qk_nope_head_dim + config.v_head_dim
    if config.attention is AttentionKind.mla:
        head_width += config.qk_rope_head_dim
    # A token attends to half the sequence on average; a product is 2 FLOPs forward and 4 backward.
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_width * sequence_length // 2
    return 6 * count_parameters(config).active_matmul + attention
