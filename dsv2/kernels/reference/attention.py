"""Causal softmax attention.

Shapes: B batch, S sequence, T cached places, H heads, Q width of a query and key head, V width of a
value head; of MLA: N + R = Q, the widths without and with rotary embedding, P = R / 2 pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.reference.rope import apply_rope


def masked_softmax(scores_BHT: Tensor, visible_BT: Tensor) -> Tensor:
    """Softmax over the places that are visible (bool), in fp32, returned in the scores' dtype."""
    hidden_B1T = ~visible_BT.unsqueeze(1)
    return scores_BHT.float().masked_fill(hidden_B1T, float("-inf")).softmax(dim=-1).to(scores_BHT.dtype)


def causal_attention(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v over each position and those before it, [B, S, H, V]."""
    v_dim = v_BSHV.shape[-1]
    if q_BSHQ.device.type == "cpu" and v_dim < q_BSHQ.shape[-1]:
        # torch's fused CPU attention wants equal widths; zero columns change no other column.
        v_BSHV = F.pad(v_BSHV, (0, q_BSHQ.shape[-1] - v_dim))
    out_BHSV = F.scaled_dot_product_attention(
        q_BSHQ.transpose(1, 2), k_BSHQ.transpose(1, 2), v_BSHV.transpose(1, 2), is_causal=True, scale=scale
    )
    return out_BHSV.transpose(1, 2)[..., :v_dim]


def latent_attention(
    q_BSHQ: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor, cos_SP: Tensor, sin_SP: Tensor, scale: float
) -> Tensor:
    """MLA from its projections (arXiv 2405.04434, eqs. 39-46), [B, S, H, V].

    Args:
        q_BSHQ: queries before rotation, the rotary part last.
        kv_BSHX: X = N + V: each head's key without its rotary part, then its value.
        k_rope_BSR: the ONE decoupled key of all heads (eq. 43), before rotation.
    """
    heads, rope = q_BSHQ.shape[2], k_rope_BSR.shape[-1]
    nope = q_BSHQ.shape[-1] - rope
    q_nope_BSHN, q_rope_BSHR = q_BSHQ.split([nope, rope], dim=-1)
    k_nope_BSHN, v_BSHV = kv_BSHX.split([nope, kv_BSHX.shape[-1] - nope], dim=-1)
    k_rope_BS1R = apply_rope(k_rope_BSR.unsqueeze(2), cos_SP, sin_SP)
    q = torch.cat((q_nope_BSHN, apply_rope(q_rope_BSHR, cos_SP, sin_SP)), dim=-1)
    k = torch.cat((k_nope_BSHN, k_rope_BS1R.expand(-1, -1, heads, -1)), dim=-1)
    return causal_attention(q, k, v_BSHV, scale)
