"""Multi-head Latent Attention (arXiv 2405.04434, section 2.1, eqs. 37-47 of appendix C).

Shapes: B batch, S sequence, D hidden_size, H heads, N qk_nope_head_dim, R qk_rope_head_dim,
V v_head_dim. Parameter names are those of the published weights.
"""

import torch
from torch import Tensor, nn

from dsv2.config import ModelConfig
from dsv2.kernels.attention import causal_attention
from dsv2.model.rope import apply_rope, softmax_scale


class MultiHeadLatentAttention(nn.Module):
    """Causal attention whose keys and values come from one compressed latent a token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.num_heads, self.nope_dim, self.rope_dim, self.v_dim = heads, nope, rope, config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        # Eq. 46: the scale counts both parts of the head.
        self.scale = softmax_scale(nope + rope, config.rope_scaling)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        # Eqs. 37-39: W_DQ, then W_UQ and W_QR as one product; without compression both act on h itself.
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * (nope + rope), bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        # Eqs. 41 and 43: W_DKV and W_KR as one product; eqs. 42 and 45: W_UK and W_UV as one.
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=eps)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (nope + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)

    def queries(self, x_BSD: Tensor) -> Tensor:
        """Queries before rotation, [B, S, H, N + R]."""
        if hasattr(self, "q_proj"):
            q = self.q_proj(x_BSD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        return q.unflatten(-1, (self.num_heads, self.nope_dim + self.rope_dim))

    def forward(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        q_nope_BSHN, q_rope_BSHR = self.queries(x_BSD).split([self.nope_dim, self.rope_dim], dim=-1)
        latent_BSC, k_rope_BSR = self.kv_a_proj_with_mqa(x_BSD).split(
            [self.kv_lora_rank, self.rope_dim], dim=-1
        )
        kv = self.kv_b_proj(self.kv_a_layernorm(latent_BSC)).unflatten(-1, (self.num_heads, -1))
        k_nope_BSHN, v_BSHV = kv.split([self.nope_dim, self.v_dim], dim=-1)

        q_rope_BSHR = apply_rope(q_rope_BSHR, cos_SP, sin_SP)
        # Eq. 43: ONE decoupled key, taken from h and shared by all heads.
        k_rope_BS1R = apply_rope(k_rope_BSR.unsqueeze(2), cos_SP, sin_SP)
        q = torch.cat((q_nope_BSHN, q_rope_BSHR), dim=-1)
        k = torch.cat((k_nope_BSHN, k_rope_BS1R.expand(-1, -1, self.num_heads, -1)), dim=-1)
        out_BSHV = causal_attention(q, k, v_BSHV, self.scale)
        return self.o_proj(out_BSHV.flatten(-2))
