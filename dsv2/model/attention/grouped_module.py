"""Attention with a key and a value for every head (MHA), for groups of heads (GQA) or for all (MQA).

What the paper measures MLA against (appendix D). Heads of queries, keys and values are all of width
qk_nope_head_dim, and RoPE turns the whole head.

Shapes: B batch, S sequence, T cached places, D hidden_size, G key and value heads, g query heads that
share one of them, H = G * g query heads, Q their width.
"""

import torch
from torch import Tensor, nn

from dsv2.config.schema import ModelConfig
from dsv2.kernels.reference.attention import causal_attention, masked_softmax
from dsv2.kernels.reference.rope import apply_rope
from dsv2.model.rope import softmax_scale
from dsv2.model.sizes import key_value_heads


class GroupedQueryAttention(nn.Module):
    """Causal attention of H query heads over G key and value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.groups, self.head_dim = key_value_heads(config), config.qk_nope_head_dim
        self.heads_a_group = config.num_attention_heads // self.groups
        self.scale = softmax_scale(self.head_dim, config.rope_scaling)
        hidden, q_width = config.hidden_size, config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, q_width, bias=False)
        self.k_proj = nn.Linear(hidden, self.groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(q_width, hidden, bias=False)

    def _queries(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        """Turned, [B, S, H, Q]; consecutive heads share a key."""
        return apply_rope(self.q_proj(x_BSD).unflatten(-1, (-1, self.head_dim)), cos_SP, sin_SP)

    def cached(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> tuple[Tensor, Tensor]:
        """What decoding keeps of each token: its turned keys and its values, [B, S, G, Q] each."""
        k_BSGQ = self.k_proj(x_BSD).unflatten(-1, (self.groups, self.head_dim))
        v_BSGQ = self.v_proj(x_BSD).unflatten(-1, (self.groups, self.head_dim))
        return apply_rope(k_BSGQ, cos_SP, sin_SP), v_BSGQ

    def forward(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        q_BSHQ = self._queries(x_BSD, cos_SP, sin_SP)
        k_BSHQ, v_BSHQ = (
            kept.repeat_interleave(self.heads_a_group, dim=2) for kept in self.cached(x_BSD, cos_SP, sin_SP)
        )
        return self.o_proj(causal_attention(q_BSHQ, k_BSHQ, v_BSHQ, self.scale).flatten(-2))

    def decode(
        self,
        x_B1D: Tensor,
        cos_B1P: Tensor,
        sin_B1P: Tensor,
        k_BTGQ: Tensor,
        v_BTGQ: Tensor,
        visible_BT: Tensor,
    ) -> Tensor:
        """[B, 1, D] for one token of each sequence, from what is cached of it and of those before it."""
        q_BHQ = self._queries(x_B1D, cos_B1P, sin_B1P).squeeze(1)
        q_BGgQ = q_BHQ.unflatten(1, (self.groups, self.heads_a_group))
        scores_BGgT = torch.einsum("bghq,btgq->bght", q_BGgQ, k_BTGQ) * self.scale
        shares_BHT = masked_softmax(scores_BGgT.flatten(1, 2), visible_BT)
        out_BGgQ = torch.einsum("bght,btgq->bghq", shares_BHT.view_as(scores_BGgT), v_BTGQ)
        return self.o_proj(out_BGgQ.flatten(1)).unsqueeze(1)
