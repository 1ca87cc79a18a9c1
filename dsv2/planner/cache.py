"""Elements that decoding caches of one token (tables 1 and 9), from the sizes alone.

`python -m dsv2 cache model=lite` prints them for every kind of attention.
"""

from dataclasses import replace

from dsv2.config.schema import AttentionKind, ModelConfig
from dsv2.model.sizes import attention_matrices, key_value_heads


def elements_per_token(config: ModelConfig) -> int:
    """Over all layers: MLA (d_c + d_h^R) l, otherwise 2 n d_h l with n key and value heads."""
    if config.attention is AttentionKind.mla:
        return (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers
    return 2 * key_value_heads(config) * config.qk_nope_head_dim * config.num_hidden_layers


def mha_heads_of_as_many_parameters(config: ModelConfig) -> int:
    """The most heads with which MHA has no more attention parameters than this model; at least 1."""
    one_head = replace(config, attention=AttentionKind.mha, num_attention_heads=1, num_key_value_heads=None)
    return max(1, attention_matrices(config) // attention_matrices(one_head))
