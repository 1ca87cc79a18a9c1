"""Causal softmax attention, and Multi-head Latent Attention on top of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.reference.rope import apply_rope


def masked_softmax(scores_BHC: Tensor, visible_BC: Tensor) -> Tensor:
    """Return the softmax over the visible positions (bool), computed in fp32, in the scores' dtype."""
    hidden_B1C = ~visible_BC.unsqueeze(1)
    return scores_BHC.float().masked_fill(hidden_B1C, float("-inf")).softmax(dim=-1).to(scores_BHC.dtype)


def causal_attention(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    """Return softmax(q k^T * scale) v, [B, S, H, V]. A position sees itself and those before it."""
    v_dim = v_BSHV.shape[-1]
    if q_BSHQ.device.type == "cpu" and v_dim < q_BSHQ.shape[-1]:
        # torch's fused CPU attention needs equal widths. Zero columns do not change the other columns.
        v_BSHV = F.pad(v_BSHV, (0, q_BSHQ.shape[-1] - v_dim))
    out_BHSV = F.scaled_dot_product_attention(
        q_BSHQ.transpose(1, 2), k_BSHQ.transpose(1, 2), v_BSHV.transpose(1, 2), is_causal=True, scale=scale
    )
    return out_BHSV.transpose(1, 2)[..., :v_dim]


def latent_attention(
    q_BSHQ: Tensor, kv: Tensor, k_rope_BSR: Tensor, cos_SA: Tensor, sin_SA: Tensor, *, scale: float
) -> Tensor:
    """Return MLA from its projections, [B, S, H, V]; see AttentionKernels."""
    heads = q_BSHQ.shape[2]
    rope = k_rope_BSR.shape[-1]
    nope = q_BSHQ.shape[-1] - rope
    q_nope_BSHN, q_rope_BSHR = q_BSHQ.split([nope, rope], dim=-1)
    k_nope_BSHN, v_BSHV = kv.split([nope, kv.shape[-1] - nope], dim=-1)
    k_rope_BS1R = apply_rope(k_rope_BSR.unsqueeze(2), cos_SA, sin_SA)
    q_BSHQ = torch.cat((q_nope_BSHN, apply_rope(q_rope_BSHR, cos_SA, sin_SA)), dim=-1)
    k_BSHQ = torch.cat((k_nope_BSHN, k_rope_BS1R.expand(-1, -1, heads, -1)), dim=-1)
    return causal_attention(q_BSHQ, k_BSHQ, v_BSHV, scale)
