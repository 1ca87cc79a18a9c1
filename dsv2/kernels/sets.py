"""The set of operations that a model is built with."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from dsv2.kernels.reference.adamw import adamw, sum_of_squares
from dsv2.kernels.reference.attention import latent_attention
from dsv2.kernels.reference.experts import routed_experts
from dsv2.kernels.reference.head import head_loss
from dsv2.kernels.reference.linear import linears
from dsv2.kernels.reference.norm import add_rms_norm, add_up, rms_norm
from dsv2.kernels.reference.router import Routing, SequenceSums, route, sequence_sums
from dsv2.kernels.reference.rows import gather_rows, sum_rows
from dsv2.kernels.reference.swiglu import swiglu


@dataclass(frozen=True)
class KernelSet:
    """Functions with the signatures of the reference ones."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    add_up: Callable[..., Tensor]
    linears: Callable[..., tuple[Tensor, ...]]
    latent_attention: Callable[..., Tensor]
    swiglu: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    route: Callable[..., Routing]
    sequence_sums: Callable[[Routing, int, int], SequenceSums]
    routed_experts: Callable[..., Tensor]
    gather_rows: Callable[..., Tensor]
    sum_rows: Callable[..., Tensor]
    head_loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    adamw: Callable[..., None]
    sum_of_squares: Callable[[list[Tensor]], Tensor]


REFERENCE = KernelSet(
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    add_up=add_up,
    linears=linears,
    latent_attention=latent_attention,
    swiglu=swiglu,
    route=route,
    sequence_sums=sequence_sums,
    routed_experts=routed_experts,
    gather_rows=gather_rows,
    sum_rows=sum_rows,
    head_loss=head_loss,
    adamw=adamw,
    sum_of_squares=sum_of_squares,
)


def _fused() -> KernelSet:
    """Needs Triton, which only machines with an NVIDIA GPU have."""
    from dsv2.kernels.fused import adamw, attention, experts, head, linear, norm, router, rows, swiglu

    return KernelSet(
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        add_up=norm.add_up,
        linears=linear.linears,
        latent_attention=attention.latent_attention,
        swiglu=swiglu.swiglu,
        route=router.route,
        sequence_sums=router.sequence_sums,
        routed_experts=experts.routed_experts,
        gather_rows=rows.gather_rows,
        sum_rows=rows.sum_rows,
        head_loss=head.head_loss,
        adamw=adamw.adamw,
        sum_of_squares=adamw.sum_of_squares,
    )


def _fused_cute() -> KernelSet:
    """Needs FlashAttention-4 and quack too. They replace cuDNN's attention and torch's grouped products."""
    # FlashAttention-4 warns of its own call.
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
    from dsv2.kernels.fused import attention, experts_cute

    return replace(
        _fused(),
        latent_attention=attention.latent_attention_flash4,
        routed_experts=experts_cute.routed_experts,
    )


BUILDERS: dict[str, Callable[[], KernelSet]] = {
    "reference": lambda: REFERENCE,
    "fused": _fused,
    "fused_cute": _fused_cute,
}


def load_kernels(name: str) -> KernelSet:
    """Return the set that runtime.kernels names. dsv2/kernels/specs.py says what each one needs."""
    return BUILDERS[name]()
