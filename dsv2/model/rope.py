"""Angles of the rotary position embedding (arXiv 2405.04434, eqs. 39 and 43), plain or by YaRN (3.1.4).

Shapes: S sequence, P pairs of a head's rotary dimensions. The pairs are interleaved, (x0, x1), (x2, x3),
..., as in the published weights; dsv2/kernels/reference/rope.py turns them.
"""

import math

import torch
from torch import Tensor

from dsv2.config.schema import RopeScalingConfig


def _own_share(dim: int, theta: float, scaling: RopeScalingConfig, device: torch.device) -> Tensor:
    """fp64 [P]: how much of its own speed each pair keeps, 1 for the fast ones to 0 for the slow ones.

    As in the published model the ramp is linear in the pair's number, between the whole numbers around
    the pairs that turn `beta_fast` and `beta_slow` times over the original context. (The YaRN paper
    writes it as linear in the number of turns.)
    """

    def pair_that_turns(times: float) -> float:
        slowdown = scaling.original_max_position_embeddings / (2 * math.pi * times)
        return dim * math.log(slowdown) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    pairs_P = torch.arange(dim // 2, device=device, dtype=torch.float64)
    return 1 - ((pairs_P - first) / max(last - first, 0.001)).clamp(0, 1)


def _magnitude(factor: float, mscale: float) -> float:
    """m(x) = 0.1 x ln s + 1: longer contexts want sharper attention."""
    return 0.1 * mscale * math.log(factor) + 1


def rope_tables(
    positions: Tensor, dim: int, theta: float, scaling: RopeScalingConfig | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at integer `positions` of any shape, fp32 [..., P].

    Pair i turns by theta^(-2i/dim) a position; YaRN slows the slow pairs down `factor` times.

    They are made anew where they are used, never kept as buffers: a buffer would be cast to bf16 with
    the module, and an angle of thousands of radians in bf16 is noise.
    """
    exponents_P = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    speeds_P, magnitude = theta**-exponents_P, 1.0
    if scaling is not None:
        own_P = _own_share(dim, theta, scaling, positions.device)
        speeds_P = speeds_P * (own_P + (1 - own_P) / scaling.factor)
        magnitude = _magnitude(scaling.factor, scaling.mscale) / _magnitude(
            scaling.factor, scaling.mscale_all_dim
        )
    angles = positions.double().unsqueeze(-1) * speeds_P
    return (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()


def softmax_scale(head_width: int, scaling: RopeScalingConfig | None) -> float:
    """What scores are multiplied by: 1 / sqrt(width), under YaRN times m(mscale_all_dim)^2."""
    sharper = 1.0 if scaling is None else _magnitude(scaling.factor, scaling.mscale_all_dim) ** 2
    return head_width**-0.5 * sharper
