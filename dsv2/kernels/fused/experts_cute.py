"""The routed experts of kernels/reference/experts.py with quack's grouped products and SwiGLU at their ends.

A pair's weight comes last, in the sum over a token's pairs: w (W2 h). In backward the product with W2
ends in the gradients of gate and up, the weighted activations that W2's own gradient needs, and the
gradient of the weight. quack interleaves gate and up within a row; `concat_layout` names the tensors, w13
and its gradient, in which all of gate comes before all of up. Kept for backward: the pairs' rows, and
gate and up.

Shapes: R rows, K slots a row, P pairs of a row and an expert (and some spare), D hidden_size, E experts,
F their width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm, gemm_act, gemm_dact

from dsv2.kernels.fused.experts import routed_experts_by, weights_gradient
from dsv2.kernels.fused.rows import add_rows, copy_rows
from dsv2.kernels.reference.rows import RowMap

# quack keeps a plan for every shape it has seen: a changing number of pairs must not be ever new ones.
SPARE = 2048
# SwiGLU's backward needs registers: 2.5 ms where quack's own choice takes 3.6 (196608 pairs, V2-Lite, H200).
NARROW = GemmConfig(tile_m=128, tile_n=128, pingpong=True, is_dynamic_persistent=False, cluster_m=2)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, weights_RK, w13_E2FD, w2_EDF, pairs: RowMap, place_RK, ends_E):
        ctx.pairs, n_pairs = pairs, len(pairs.slot_P)
        ctx.length = n_pairs + -n_pairs % SPARE
        starts = F.pad(ends_E, (1, 0))
        x_PD = copy_rows(x_RD, pairs, ctx.length)
        gate_up_P2F, hidden_PF = gemm_act(
            x_PD,
            w13_E2FD.mT,
            activation="swiglu",
            cu_seqlens_m=starts,
            concat_layout=("B",),
            tuned=False,
        )
        y_PD = gemm(hidden_PF, w2_EDF.mT, cu_seqlens_m=starts, tuned=False)
        ctx.save_for_backward(x_PD, weights_RK, w13_E2FD, w2_EDF, place_RK, starts, gate_up_P2F)
        return add_rows(y_PD, place_RK, weights_RK)

    @staticmethod
    def backward(ctx, grad_RD):
        x_PD, weights_RK, w13_E2FD, w2_EDF, place_RK, starts, gate_up_P2F = ctx.saved_tensors
        pairs, n_pairs = ctx.pairs, len(ctx.pairs.slot_P)
        grad_y_PD = copy_rows(grad_RD.contiguous(), pairs, ctx.length)
        weight_P = F.pad(weights_RK.flatten()[pairs.slot_P], (0, ctx.length - n_pairs))
        grad_gate_up_P2F, hidden_PF, grad_weight_P = gemm_dact(
            grad_y_PD,
            w2_EDF,
            gate_up_P2F,
            activation="swiglu",
            colvec_scale=weight_P,
            colvec_reduce=True,
            cu_seqlens_m=starts,
            dynamic_scheduler=False,
            config=NARROW,
        )
        grad_w2 = gemm(grad_y_PD.mT, hidden_PF, cu_seqlens_k=starts, tuned=False)
        del grad_y_PD, hidden_PF
        grad_w13 = torch.empty_like(w13_E2FD)
        gemm(
            x_PD.mT,
            grad_gate_up_P2F,
            out=grad_w13.mT,
            cu_seqlens_k=starts,
            concat_layout=("out",),
            tuned=False,
        )
        grad_x_PD = gemm(grad_gate_up_P2F, w13_E2FD, cu_seqlens_m=starts, concat_layout=("B",), tuned=False)
        grad_weights = weights_gradient(grad_weight_P[:n_pairs], pairs, place_RK)
        return add_rows(grad_x_PD, place_RK), grad_weights, grad_w13, grad_w2, *[None] * 3


routed_experts = partial(routed_experts_by, _RoutedExperts)
