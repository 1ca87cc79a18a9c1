"""The kernel sets by name: what each one requires, and what the planner counts for it.

Nothing here imports torch. dsv2/kernels/sets.py builds the sets. A new set is a class in this file and a
function in sets.py.
"""

from typing import ClassVar, NamedTuple, NoReturn

from dsv2.config.rules import refuse
from dsv2.config.schema import ModelConfig, Precision
from dsv2.packages import CUTE, misfit

HEAD_CHUNK = 16384  # tokens per chunk of the fused head: their logits take 3.1 GiB at a vocabulary of 102400


class HeadWidths(NamedTuple):
    """Widths of the heads that a model hands to `latent_attention`."""

    rotary: int  # of a key's rotated part
    key: int  # of a whole query or key
    value: int


class KernelSpec:
    """One kernel set. The defaults describe a set that runs anywhere: its checks pass.

    A check raises UserError, which names the field, its value and what would be right.
    """

    name: str  # the value of runtime.kernels
    needs_gpu = False
    packages: ClassVar[dict[str, str]] = {}  # beyond requirements.txt; name: version specifier
    fallback = "reference"  # the set to use if these packages are missing

    # What the planner counts:
    is_fused = False  # whether the bytes are those of dsv2/kernels/fused, not of dsv2/kernels/reference
    keeps_pair_weights = True  # a weight per (token, expert) pair is kept for the backward pass
    overwrites_gate_and_up = True  # their gradients take the memory that the forward pass kept
    sums_query_gradients_in_fp32 = False  # in a separate tensor

    def check(self, model: ModelConfig, precision: Precision) -> None:
        """Refuse a precision, a hidden size or an expert width that the set does not support."""

    def check_heads(self, heads: HeadWidths) -> None:
        """Refuse head widths that `latent_attention` supports on no GPU."""

    def check_cpu(self) -> None:
        """Refuse to run without a GPU."""
        if self.needs_gpu:
            self._refuse("needs an NVIDIA GPU; on the CPU use runtime.kernels=reference")

    def check_gpu(self, gpu: str, capability: int, heads: HeadWidths | None) -> None:
        """Refuse a GPU that the set does not support.

        Args:
            gpu: the GPU's name.
            capability: its major compute capability: 8 is Ampere, 9 Hopper, 10 Blackwell.
            heads: widths of the inputs of `latent_attention`; None if the model does not call it.
        """

    def check_packages(self) -> None:
        """Refuse packages that are missing or have a wrong version."""
        if wrong := misfit(self.packages):
            self._refuse(f"{wrong}; or use {self.fallback}")

    def _refuse(self, right: str) -> NoReturn:
        refuse("runtime.kernels", self.name, right)

    def _require(self, fits: bool, field: str, value: int, right: str) -> None:
        if not fits:
            refuse(
                f"model.{field}", value, f"must be {right} with runtime.kernels={self.name}; or use reference"
            )


class Reference(KernelSpec):
    """Plain torch, on any device and in any precision."""

    name = "reference"


class Fused(KernelSpec):
    """Triton, grouped products and cuDNN's attention: NVIDIA GPUs, bf16."""

    name = "fused"
    needs_gpu = True
    is_fused = True

    def check(self, model: ModelConfig, precision: Precision) -> None:
        if precision is not Precision.bf16:
            self._refuse("needs runtime.precision=bf16; or use reference")
        for field in ("hidden_size", "moe_intermediate_size"):
            width = getattr(model, field)
            self._require(width % 8 == 0, field, width, "a multiple of 8")

    def check_heads(self, heads: HeadWidths) -> None:
        is_power_of_2 = heads.rotary & (heads.rotary - 1) == 0
        self._require(is_power_of_2, "qk_rope_head_dim", heads.rotary, "a power of 2")
        self._check_widths(heads)

    def _check_widths(self, heads: HeadWidths) -> None:
        """Refuse widths that cuDNN's attention does not support on Hopper, in the backward pass too."""
        if (heads.key, heads.value) != (192, 128):
            self._require_at_most(128, heads, "at most 128, or 192 beside model.v_head_dim=128,")

    def _require_at_most(self, widest: int, heads: HeadWidths, right: str) -> None:
        for field, width in (("qk_nope_head_dim + qk_rope_head_dim", heads.key), ("v_head_dim", heads.value)):
            self._require(width % 8 == 0, field, width, "a multiple of 8")
            self._require(width <= widest, field, width, right)

    def check_gpu(self, gpu: str, capability: int, heads: HeadWidths | None) -> None:
        if not _cudnn_takes(heads, capability):
            widest = max(heads.key, heads.value) if heads else 0
            self._refuse(
                f"cuDNN's attention takes heads of at most 128 on {gpu}, not {widest}; use reference"
            )


class FusedCute(Fused):
    """`fused` with FlashAttention-4 and quack's products, both written in CuTe: Hopper GPUs only."""

    name = "fused_cute"
    packages = CUTE
    fallback = "fused"
    keeps_pair_weights = False
    overwrites_gate_and_up = False
    sums_query_gradients_in_fp32 = True

    def _check_widths(self, heads: HeadWidths) -> None:
        self._require_at_most(256, heads, "at most 256")

    def check_gpu(self, gpu: str, capability: int, heads: HeadWidths | None) -> None:
        if capability != 9:
            alternatives = "fused or reference" if _cudnn_takes(heads, capability) else "reference"
            self._refuse(f"needs a Hopper GPU (H100, H800, H200), not {gpu}; or use {alternatives}")


SPECS = {spec.name: spec for spec in (Reference(), Fused(), FusedCute())}


def find_spec(name: str) -> KernelSpec:
    """Return the set that runtime.kernels names.

    Raises:
        UserError: there is no such set.
    """
    if name not in SPECS:
        refuse("runtime.kernels", name, f"must be one of {', '.join(SPECS)}")
    return SPECS[name]


def _cudnn_takes(heads: HeadWidths | None, capability: int) -> bool:
    return heads is None or capability in (9, 10) or max(heads.key, heads.value) <= 128
