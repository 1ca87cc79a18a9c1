"""Attention of H query heads over J key and value heads (MHA, GQA, MQA) as a module.

Each key head serves H / J consecutive query heads. Sizes, checks and memory are in grouped.py.
"""

import torch
from torch import Tensor, nn

from dsv2.config.schema import ModelConfig
from dsv2.kernels.reference.attention import causal_attention, masked_softmax
from dsv2.kernels.reference.rope import apply_rope
from dsv2.model.rope import Angles, softmax_scale


class GroupedQueryAttention(nn.Module):
    """Computes causal attention of all query heads over `key_value_heads` key and value heads."""

    projections: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig, key_value_heads: int):
        super().__init__()
        self.key_value_heads = key_value_heads
        self.head_dim = config.qk_nope_head_dim
        self.queries_per_key = config.num_attention_heads // key_value_heads
        self.scale = softmax_scale(self.head_dim, config.rope_scaling)
        hidden = config.hidden_size
        q_width = config.num_attention_heads * self.head_dim
        kv_width = key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, q_width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, hidden, bias=False)

    def _queries(self, x_BSD: Tensor, angles: Angles) -> Tensor:
        """Return the rotated queries [B, S, H, N]."""
        return apply_rope(self.q_proj(x_BSD).unflatten(-1, (-1, self.head_dim)), *angles)

    def cached(self, x_BSD: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Return the rotated keys and the values, [B, S, J, N] each."""
        k_BSJN = self.k_proj(x_BSD).unflatten(-1, (self.key_value_heads, self.head_dim))
        v_BSJN = self.v_proj(x_BSD).unflatten(-1, (self.key_value_heads, self.head_dim))
        return apply_rope(k_BSJN, *angles), v_BSJN

    def forward(self, x_BSD: Tensor, angles: Angles) -> Tensor:
        q_BSHN = self._queries(x_BSD, angles)
        k_BSJN, v_BSJN = self.cached(x_BSD, angles)
        k_BSHN = k_BSJN.repeat_interleave(self.queries_per_key, dim=2)
        v_BSHN = v_BSJN.repeat_interleave(self.queries_per_key, dim=2)
        return self.o_proj(causal_attention(q_BSHN, k_BSHN, v_BSHN, self.scale).flatten(-2))

    def decode(self, x_B1D: Tensor, angles: Angles, kept: tuple[Tensor, ...], visible_BC: Tensor) -> Tensor:
        """Return [B, 1, D] for one token per sequence. Query heads are grouped by their key head."""
        k_BCJN, v_BCJN = kept
        q_BHN = self._queries(x_B1D, angles).squeeze(1)
        q_BJ_queries_N = q_BHN.unflatten(1, (self.key_value_heads, self.queries_per_key))
        scores_BJ_queries_C = torch.einsum("bjqn,bcjn->bjqc", q_BJ_queries_N, k_BCJN) * self.scale
        shares_BHC = masked_softmax(scores_BJ_queries_C.flatten(1, 2), visible_BC)
        out_BJ_queries_N = torch.einsum("bjqc,bcjn->bjqn", shares_BHC.view_as(scores_BJ_queries_C), v_BCJN)
        return self.o_proj(out_BJ_queries_N.flatten(1)).unsqueeze(1)
