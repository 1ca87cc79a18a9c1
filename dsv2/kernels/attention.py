"""Causal softmax attention with a head width of queries and keys that may differ from the values'.

Shapes: B batch, S sequence, T cached places, H heads, Q width of a query and key head, V width of a
value head.
"""

import torch.nn.functional as F
from torch import Tensor


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
