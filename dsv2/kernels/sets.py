"""The kernel sets: `load_kernels` builds the one that runtime.kernels names."""

import warnings
from collections.abc import Callable
from dataclasses import replace

from dsv2.kernels.base import KernelSet
from dsv2.kernels.reference import adamw, attention, experts, head, linear, norm, router, rows, swiglu

REFERENCE = KernelSet(
    rms_norm=norm.rms_norm,
    add_rms_norm=norm.add_rms_norm,
    add_up=norm.add_up,
    linears=linear.linears,
    swiglu=swiglu.swiglu,
    latent_attention=attention.latent_attention,
    route=router.route,
    sequence_sums=router.sequence_sums,
    routed_experts=experts.routed_experts,
    late_gradients=experts.late_gradients,
    rows_by_rank=rows.rows_by_rank,
    copy_rows=rows.copy_rows,
    sum_rows=rows.sum_rows,
    head_loss=head.head_loss,
    adamw=adamw.adamw,
    sum_of_squares=adamw.sum_of_squares,
)


def _fused() -> KernelSet:
    """Return the set `fused`. It needs Triton, which torch installs only for NVIDIA GPUs."""
    from dsv2.kernels.fused import adamw, attention, experts, head, linear, norm, router, rows, swiglu

    return KernelSet(
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        add_up=norm.add_up,
        linears=linear.linears,
        swiglu=swiglu.swiglu,
        latent_attention=attention.latent_attention,
        route=router.route,
        sequence_sums=router.sequence_sums,
        routed_experts=experts.routed_experts,
        late_gradients=experts.late_gradients,
        rows_by_rank=rows.rows_by_rank,
        copy_rows=rows.copy_rows,
        sum_rows=rows.sum_rows,
        head_loss=head.head_loss,
        adamw=adamw.adamw,
        sum_of_squares=adamw.sum_of_squares,
    )


def _fused_cute() -> KernelSet:
    """Return `fused` with FlashAttention-4 and quack instead of cuDNN's attention and torch's products."""
    # FlashAttention-4 triggers this warning itself.
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
    """Return the set that runtime.kernels names. dsv2/kernels/specs.py says what each set requires."""
    return BUILDERS[name]()
