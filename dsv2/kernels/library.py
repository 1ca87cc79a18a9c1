"""The set of operations that a model is built with."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dsv2.kernels.adamw import adamw
from dsv2.kernels.attention import latent_attention
from dsv2.kernels.experts import routed_experts
from dsv2.kernels.head import head_loss
from dsv2.kernels.rows import gather_rows, sum_rows
from dsv2.kernels.swiglu import silu_mul


@dataclass(frozen=True)
class KernelSet:
    """Functions with the signatures of the reference ones."""

    latent_attention: Callable[..., Tensor]
    routed_experts: Callable[..., Tensor]
    gather_rows: Callable[..., Tensor]
    sum_rows: Callable[..., Tensor]
    silu_mul: Callable[[Tensor, Tensor], Tensor]
    head_loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    adamw: Callable[..., None]


def fused_kernels() -> KernelSet:
    """The same for an NVIDIA GPU, bf16 only. Importing them needs Triton."""
    from dsv2.kernels.fused import adamw, attention, experts, head, rows, swiglu

    return KernelSet(
        attention.latent_attention,
        experts.routed_experts,
        rows.gather_rows,
        rows.sum_rows,
        swiglu.silu_mul,
        head.head_loss,
        adamw.adamw,
    )


REFERENCE = KernelSet(latent_attention, routed_experts, gather_rows, sum_rows, silu_mul, head_loss, adamw)
