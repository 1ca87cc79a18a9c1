"""The routed experts with quack's grouped products, which apply SwiGLU before they write.

A pair's weight is applied last, in the sum over a token's pairs: w (W2 h). In the backward pass the product
with W2 also computes the gradients of gate and up, and the gradient of the weight. It returns the weighted
activations too, which the gradient of W2 needs. The activations kept for the backward pass are the pairs'
rows, gate and up.

quack interleaves gate and up within a row. `concat_layout` names the tensors in which all of gate comes
before all of up: w13 and its gradient. Tensors of P rows have spare rows after those of the pairs.
"""

from functools import partial

import torch
import torch.nn.functional as F
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm, gemm_act, gemm_dact
from torch import Tensor

from dsv2.kernels.fused.experts import now_or_later, routed_experts_by
from dsv2.kernels.fused.rows import add_rows, copy_rows, pick
from dsv2.kernels.types import RowMap

# quack caches a plan per shape. Rounding the number of pairs up to a multiple of SPARE keeps the number of
# shapes small.
SPARE = 2048
# Narrow tiles, because SwiGLU's backward pass needs registers: 2.5 ms, against 3.6 ms with quack's own choice
# (196608 pairs, V2-Lite, H200).
NARROW = GemmConfig(tile_m=128, tile_n=128, pingpong=True, is_dynamic_persistent=False, cluster_m=2)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_XD, weights_XK, w13_E2FD, w2_EDF, handle, late, slots_P, places_XK, ends_E):
        ctx.late = late
        pairs = RowMap(slots_P, places_XK)
        n_pairs = len(slots_P)
        ctx.length = n_pairs + -n_pairs % SPARE
        starts = F.pad(ends_E, (1, 0))
        x_PD = copy_rows(x_XD, pairs, ctx.length)
        gate_up_P2F, hidden_PF = gemm_act(
            x_PD,
            w13_E2FD.mT,
            activation="swiglu",
            cu_seqlens_m=starts,
            concat_layout=("B",),
            tuned=False,
        )
        y_PD = gemm(hidden_PF, w2_EDF.mT, cu_seqlens_m=starts, tuned=False)
        kept = (x_PD, weights_XK, w13_E2FD, w2_EDF, slots_P, places_XK, starts, gate_up_P2F)
        ctx.save_for_backward(*kept)
        return add_rows(y_PD, places_XK, weights_XK)

    @staticmethod
    def backward(ctx, grad_XD):
        x_PD, weights_XK, w13_E2FD, w2_EDF, slots_P, places_XK, starts, gate_up_P2F = ctx.saved_tensors
        n_pairs = len(slots_P)
        grad_y_PD = copy_rows(grad_XD.contiguous(), RowMap(slots_P, places_XK), ctx.length)
        weights_P = F.pad(weights_XK.flatten()[slots_P], (0, ctx.length - n_pairs))
        grad_gate_up_P2F, hidden_PF, grad_weights_P = gemm_dact(
            grad_y_PD,
            w2_EDF,
            gate_up_P2F,
            activation="swiglu",
            colvec_scale=weights_P,
            colvec_reduce=True,
            cu_seqlens_m=starts,
            dynamic_scheduler=False,
            config=NARROW,
        )
        for_w2 = [grad_y_PD.mT, hidden_PF]
        del grad_y_PD, hidden_PF

        def weights() -> tuple[Tensor, Tensor]:
            grad_w2 = gemm(*for_w2, cu_seqlens_k=starts, tuned=False)
            for_w2.clear()  # frees them before the next product
            grad_w13 = torch.empty_like(w13_E2FD)
            gemm(
                x_PD.mT,
                grad_gate_up_P2F,
                out=grad_w13.mT,
                cu_seqlens_k=starts,
                concat_layout=("out",),
                tuned=False,
            )
            return grad_w13, grad_w2

        grads_of_weights = now_or_later(ctx.late, weights)
        grad_x_PD = gemm(grad_gate_up_P2F, w13_E2FD, cu_seqlens_m=starts, concat_layout=("B",), tuned=False)
        grad_x = add_rows(grad_x_PD, places_XK)
        return grad_x, pick(grad_weights_P, places_XK), *grads_of_weights, *[None] * 4


routed_experts = partial(routed_experts_by, _RoutedExperts)
