"""Multi-head Latent Attention (arXiv 2405.04434, section 2.1, eqs. 37-47 of appendix C) as a module.

Parameters have their published names. Sizes, checks and memory are in mla.py.
"""

import torch
from torch import Tensor, nn

from dsv2.config.schema import ModelConfig
from dsv2.kernels.reference.attention import masked_softmax
from dsv2.kernels.reference.rope import apply_rope
from dsv2.kernels.sets import REFERENCE, KernelSet
from dsv2.model.norm import RMSNorm
from dsv2.model.rope import Angles, softmax_scale


class MultiHeadLatentAttention(nn.Module):
    """Computes causal attention whose keys and values come from one compressed latent per token."""

    projections = ("down",)

    def __init__(self, config: ModelConfig, kernels: KernelSet = REFERENCE):
        super().__init__()
        self.kernels = kernels
        self.num_heads = config.num_attention_heads
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.v_dim = config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        q_width = self.nope_dim + self.rope_dim
        # Eq. 46: the scale depends on the width of both parts of the head.
        self.scale = softmax_scale(q_width, config.rope_scaling)
        hidden = config.hidden_size
        eps = config.rms_norm_eps
        # Eqs. 37-39: W_DQ, then W_UQ and W_QR as one matrix. Without compression it multiplies h itself.
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, self.num_heads * q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps, kernels)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * q_width, bias=False)
        # Eqs. 41 and 43: W_DKV and W_KR as one matrix. Eqs. 42 and 45: W_UK and W_UV as one matrix.
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps, kernels)
        kv_width = self.num_heads * (self.nope_dim + self.v_dim)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, kv_width, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_dim, hidden, bias=False)

    @property
    def _query_down(self) -> nn.Linear:
        """Return the matrix that multiplies h for the queries: W_DQ, or without compression the only one."""
        return self.q_proj if hasattr(self, "q_proj") else self.q_a_proj

    def _queries(self, down: Tensor) -> Tensor:
        """Return the queries of eqs. 38-39 before rotation, [B, S, H, Q], from `_query_down`'s result."""
        q = down if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(down))
        return q.unflatten(-1, (self.num_heads, self.nope_dim + self.rope_dim))

    def _latent(self, down: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_kv after its norm [B, S, Z], and the decoupled key of eq. 43 before rotation [B, S, R]."""
        latent_BSZ, k_rope_BSR = down.split([self.kv_lora_rank, self.rope_dim], dim=-1)
        return self.kv_a_layernorm(latent_BSZ), k_rope_BSR

    def cached(self, x_BSD: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Return c_kv after its norm [B, S, Z] and the rotated key [B, S, R] of all heads (eq. 43)."""
        latent_BSZ, k_rope_BSR = self._latent(self.kv_a_proj_with_mqa(x_BSD))
        return latent_BSZ, apply_rope(k_rope_BSR.unsqueeze(2), *angles).squeeze(2)

    def down(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """Return the two products of h: with the queries' matrix, and with W_DKV and W_KR."""
        return self.kernels.linears(x_BSD, self._query_down.weight, self.kv_a_proj_with_mqa.weight)

    def forward(self, x_BSD: Tensor, angles: Angles) -> Tensor:
        query_down, latent_down = self.down(x_BSD)
        latent_BSZ, k_rope_BSR = self._latent(latent_down)
        kv = self.kv_b_proj(latent_BSZ).unflatten(-1, (self.num_heads, -1))
        q_BSHQ = self._queries(query_down)
        out_BSHV = self.kernels.latent_attention(q_BSHQ, kv, k_rope_BSR, *angles, scale=self.scale)
        return self.o_proj(out_BSHV.flatten(-2))

    def decode(self, x_B1D: Tensor, angles: Angles, kept: tuple[Tensor, ...], visible_BC: Tensor) -> Tensor:
        """Return [B, 1, D] for one token per sequence, without computing keys or values of heads (2.1.2).

        q_nope . (W_UK c) = (W_UK^T q_nope) . c. Likewise W_UV multiplies the sum over positions.
        """
        latent_BCZ, k_rope_BCR = kept
        q_nope_B1HN, q_rope_B1HR = self._queries(self._query_down(x_B1D)).split(
            [self.nope_dim, self.rope_dim], dim=-1
        )
        q_nope_BHN = q_nope_B1HN.squeeze(1)
        q_rope_BHR = apply_rope(q_rope_B1HR, *angles).squeeze(1)
        w_uk_HNZ, w_uv_HVZ = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).split(
            [self.nope_dim, self.v_dim], dim=1
        )
        q_latent_BHZ = torch.einsum("bhn,hnz->bhz", q_nope_BHN, w_uk_HNZ)
        scores_BHC = torch.einsum("bhz,bcz->bhc", q_latent_BHZ, latent_BCZ)
        scores_BHC = (scores_BHC + torch.einsum("bhr,bcr->bhc", q_rope_BHR, k_rope_BCR)) * self.scale
        mixed_BHZ = torch.einsum("bhc,bcz->bhz", masked_softmax(scores_BHC, visible_BC), latent_BCZ)
        out_BHV = torch.einsum("bhz,hvz->bhv", mixed_BHZ, w_uv_HVZ)
        return self.o_proj(out_BHV.flatten(1)).unsqueeze(1)
