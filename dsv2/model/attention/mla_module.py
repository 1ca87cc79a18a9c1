"""Multi-head Latent Attention (arXiv 2405.04434, section 2.1, eqs. 37-47 of appendix C).

Shapes: B batch, S sequence, T cached places, D hidden_size, H heads, N qk_nope_head_dim,
R qk_rope_head_dim, V v_head_dim, C kv_lora_rank. Parameter names are those of the published weights.
"""

import torch
from torch import Tensor, nn

from dsv2.config.schema import ModelConfig
from dsv2.kernels.reference.attention import masked_softmax
from dsv2.kernels.reference.rope import apply_rope
from dsv2.kernels.sets import REFERENCE, KernelSet
from dsv2.model.norm import RMSNorm
from dsv2.model.rope import softmax_scale


class MultiHeadLatentAttention(nn.Module):
    """Causal attention whose keys and values come from one compressed latent a token."""

    def __init__(self, config: ModelConfig, kernels: KernelSet = REFERENCE):
        super().__init__()
        self.kernels = kernels
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
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps, kernels)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        # Eqs. 41 and 43: W_DKV and W_KR as one product; eqs. 42 and 45: W_UK and W_UV as one.
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + rope, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps, kernels)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (nope + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)

    @property
    def _query_down(self) -> nn.Linear:
        """What acts on h itself: W_DQ, or all of the query's projection without compression."""
        return self.q_proj if hasattr(self, "q_proj") else self.q_a_proj

    def _queries(self, down: Tensor) -> Tensor:
        """Eqs. 38-39 before rotation, from `_query_down`'s result: [B, S, H, N + R]."""
        q = down if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(down))
        return q.unflatten(-1, (self.num_heads, self.nope_dim + self.rope_dim))

    def _latent(self, down: Tensor) -> tuple[Tensor, Tensor]:
        """c_kv after its norm [B, S, C], and the decoupled key of eq. 43 before rotation [B, S, R]."""
        latent_BSC, k_rope_BSR = down.split([self.kv_lora_rank, self.rope_dim], dim=-1)
        return self.kv_a_layernorm(latent_BSC), k_rope_BSR

    def cached(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> tuple[Tensor, Tensor]:
        """What decoding keeps of each token: c_kv after its norm [B, S, C], and the turned key [B, S, R].

        Eq. 43: ONE decoupled key, taken from h and shared by all heads.
        """
        latent_BSC, k_rope_BSR = self._latent(self.kv_a_proj_with_mqa(x_BSD))
        return latent_BSC, apply_rope(k_rope_BSR.unsqueeze(2), cos_SP, sin_SP).squeeze(2)

    def down(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """What acts on h itself: for the queries, and W_DKV with W_KR."""
        return self.kernels.linears(x_BSD, self._query_down.weight, self.kv_a_proj_with_mqa.weight)

    def forward(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        query_down, latent_down = self.down(x_BSD)
        latent_BSC, k_rope_BSR = self._latent(latent_down)
        kv_BSHX = self.kv_b_proj(latent_BSC).unflatten(-1, (self.num_heads, -1))
        out_BSHV = self.kernels.latent_attention(
            self._queries(query_down), kv_BSHX, k_rope_BSR, cos_SP, sin_SP, scale=self.scale
        )
        return self.o_proj(out_BSHV.flatten(-2))

    def decode(
        self,
        x_B1D: Tensor,
        cos_B1P: Tensor,
        sin_B1P: Tensor,
        latent_BTC: Tensor,
        k_rope_BTR: Tensor,
        visible_BT: Tensor,
    ) -> Tensor:
        """[B, 1, D] for one token of each sequence, from what is cached of it and of those before it.

        q_nope . (W_UK c) = (W_UK^T q_nope) . c, and W_UV moves behind the sum over tokens in the same
        way: no key and no value of any head is ever made (section 2.1.2).
        """
        q_nope_B1HN, q_rope_B1HR = self._queries(self._query_down(x_B1D)).split(
            [self.nope_dim, self.rope_dim], dim=-1
        )
        q_nope_BHN = q_nope_B1HN.squeeze(1)
        q_rope_BHR = apply_rope(q_rope_B1HR, cos_B1P, sin_B1P).squeeze(1)
        w_HXC = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        w_uk_HNC, w_uv_HVC = w_HXC.split([self.nope_dim, self.v_dim], dim=1)
        q_latent_BHC = torch.einsum("bhn,hnc->bhc", q_nope_BHN, w_uk_HNC)
        scores_BHT = torch.einsum("bhc,btc->bht", q_latent_BHC, latent_BTC)
        scores_BHT = (scores_BHT + torch.einsum("bhr,btr->bht", q_rope_BHR, k_rope_BTR)) * self.scale
        mixed_BHC = torch.einsum("bht,btc->bhc", masked_softmax(scores_BHT, visible_BT), latent_BTC)
        out_BHV = torch.einsum("bhc,hvc->bhv", mixed_BHC, w_uv_HVC)
        return self.o_proj(out_BHV.flatten(1)).unsqueeze(1)
