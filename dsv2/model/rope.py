"""Angles of the rotary position embedding (arXiv 2405.04434, eqs. 39 and 43), plain or with YaRN (3.1.4).

A head's rotary dimensions form the pairs (x0, x1), (x2, x3) and so on, as in the published weights.
dsv2/kernels/reference/rope.py rotates the pairs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.config.schema import RopeScalingConfig


class Angles(NamedTuple):
    """cos and sin of the angles at given positions, fp32 [..., A]."""

    cos: Tensor
    sin: Tensor


def _kept_share(width: int, theta: float, scaling: RopeScalingConfig, device: torch.device) -> Tensor:
    """Return the share of its original speed that each pair keeps: fp64 [A], from 1 (fast pairs) to 0 (slow).

    The share is 1 up to the pair that rotates `beta_fast` times over the original context, rounded down. From
    there it falls to 0 at the pair that rotates `beta_slow` times, rounded up. It falls linearly with the
    pair's index, as in the published model. (In the YaRN paper it falls linearly with the rotations.)
    """

    def pair_that_rotates(times: float) -> float:
        slowdown = scaling.original_max_position_embeddings / (2 * math.pi * times)
        return width * math.log(slowdown) / (2 * math.log(theta))

    first = max(math.floor(pair_that_rotates(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_rotates(scaling.beta_slow)), width - 1)
    pairs_A = torch.arange(width // 2, device=device, dtype=torch.float64)
    return 1 - ((pairs_A - first) / max(last - first, 0.001)).clamp(0, 1)


def _magnitude(factor: float, mscale: float) -> float:
    """Return 0.1 x mscale x ln(factor) + 1. Longer contexts need sharper attention."""
    return 0.1 * mscale * math.log(factor) + 1


def rope_tables(
    positions: Tensor, width: int, theta: float, scaling: RopeScalingConfig | None = None
) -> Angles:
    """Return the angles at integer `positions` of any shape, for heads with `width` rotary dimensions.

    Pair i rotates by theta^(-2i/width) radians per position. YaRN divides a slow pair's speed by `factor`.

    The angles are computed on every use instead of kept as buffers. A buffer would be cast to bf16 with the
    module, and an angle of thousands of radians in bf16 is noise.
    """
    exponents_A = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
    speeds_A = theta**-exponents_A
    magnitude = 1.0
    if scaling is not None:
        kept_A = _kept_share(width, theta, scaling, positions.device)
        speeds_A = speeds_A * (kept_A + (1 - kept_A) / scaling.factor)
        magnitude = _magnitude(scaling.factor, scaling.mscale) / _magnitude(
            scaling.factor, scaling.mscale_all_dim
        )
    angles = positions.double().unsqueeze(-1) * speeds_A
    return Angles((angles.cos() * magnitude).float(), (angles.sin() * magnitude).float())


def softmax_scale(head_width: int, scaling: RopeScalingConfig | None) -> float:
    """Return the factor of attention scores: 1 / sqrt(head_width), with YaRN times `_magnitude` squared."""
    sharpening = 1.0 if scaling is None else _magnitude(scaling.factor, scaling.mscale_all_dim) ** 2
    return head_width**-0.5 * sharpening
