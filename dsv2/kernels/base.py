"""The kernels as protocols, one small protocol per part of the model or optimizer.

dsv2/kernels/sets.py builds the sets. The functions in dsv2/kernels/reference define the results; those in
dsv2/kernels/fused agree with them in bf16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dsv2.kernels.types import AdamWStep, Choice, LateGradients, RowMap, SequenceSums


class NormKernels(Protocol):
    """RMSNorm, the residual stream, and matrices with a common input. Leading dimensions are free."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight, where rms(x) = sqrt(mean(x^2) + eps) over the last dimension."""
        ...

    def add_rms_norm(
        self, x: Tensor, change: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return x + change (or x) and its RMSNorm.

        Continue with the returned x, not with the argument. Only then can the fused backward pass add its
        gradient while it computes the norm's.
        """
        ...

    def add_up(self, x: Tensor, *terms: Tensor) -> Tensor:
        """Return the sum of tensors of one shape."""
        ...

    def linears(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return x W^T for each weight [width, input width]."""
        ...


class FeedForwardKernels(Protocol):
    """The SwiGLU network of a dense layer or of the shared experts."""

    def swiglu(self, x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        """Return down (silu(gate x) * up x), [..., D]."""
        ...


class AttentionKernels(Protocol):
    """Attention over the sequence."""

    def latent_attention(
        self, q_BSHQ: Tensor, kv: Tensor, k_rope_BSR: Tensor, cos_SA: Tensor, sin_SA: Tensor, *, scale: float
    ) -> Tensor:
        """Return MLA from its projections (arXiv 2405.04434, eqs. 39-46), [B, S, H, V].

        Args:
            q_BSHQ: queries before rotation, the rotary part last.
            kv: [B, S, H, N + V], each head's key without its rotary part, then its value.
            k_rope_BSR: the ONE decoupled key of all heads (eq. 43), before rotation.
            scale: scores are multiplied by it before the softmax.
        """
        ...


class RouterKernels(Protocol):
    """The choice of experts, and sums over it."""

    def route(self, x_TD: Tensor, centroids_ED: Tensor, top_k: int, n_group: int, topk_group: int) -> Choice:
        """Select `top_k` experts per token within the `topk_group` groups of highest affinity."""
        ...

    def sequence_sums(self, choice: Choice, n_sequences: int, n_group: int) -> SequenceSums:
        """Return sums over `n_sequences` sequences, whose tokens follow one another in `choice`."""
        ...


class ExpertKernels(Protocol):
    """The routed experts, and the rows that travel to them and back."""

    def routed_experts(
        self,
        x_XD: Tensor,
        expert_ids_XK: Tensor,
        weights_XK: Tensor,
        counts_E: Tensor,
        *,
        n_pairs: int,
        first_expert: int,
        w13_E2FD: Tensor,
        w2_EDF: Tensor,
        late: LateGradients | None = None,
    ) -> Tensor:
        """Return sum_k weights[x, k] * FFN_ids[x, k](row x), [X, D], summed in fp32.

        Args:
            expert_ids_XK: whole numbers of any dtype. An id without a matrix here adds nothing.
            counts_E: int64, how often each expert of w13 and w2 is chosen.
            first_expert: the id of the first expert of w13 and w2.
            late: the node that computes the gradients of w13 and w2. None: the experts' own node does.
            n_pairs: at least the sum of `counts_E`; memory is allocated for this many pairs.
            w13_E2FD: W1 (gate) above W3 (up).
        """
        ...

    def late_gradients(self, w13_E2FD: Tensor, w2_EDF: Tensor) -> LateGradients | None:
        """Return a node that computes the weights' gradients later than the rows' gradients.

        Autograd prefers nodes that were made later. So the rows' gradients can begin to travel to other ranks
        before the weights' gradients are computed. None if the experts cannot separate the two.
        """
        ...

    def rows_by_rank(self, expert_ids_TK: Tensor, n_local: int, n_ranks: int) -> tuple[RowMap, Tensor]:
        """Map each (token, rank) pair with an expert of the token to a row, by rank, then by token.

        Args:
            expert_ids_TK: int64; -1 is no expert. Rank w holds the w-th block of `n_local` experts.

        Returns:
            The rows, then the slots without a row: T x W slots in all. Each rank's number of rows, int64 [W].
        """
        ...

    def copy_rows(self, x_TD: Tensor, rows: RowMap) -> Tensor:
        """Return, for each row, a copy of its token's hidden state, [rows, D]. Autograd does not see it."""
        ...

    def sum_rows(self, y: Tensor, rows: RowMap, n_tokens: int) -> Tensor:
        """Return [T, D], the sum in fp32 of each token's rows of y [rows, D]. Autograd does not see it."""
        ...


class HeadKernels(Protocol):
    """The output head with its loss."""

    def head_loss(self, hidden_TD: Tensor, weight_vocab_D: Tensor, labels_T: Tensor) -> Tensor:
        """Return the mean cross-entropy per token in nats, fp32 []."""
        ...


class OptimizerKernels(Protocol):
    """AdamW on a range of a parameter, and the norm before it."""

    def adamw(
        self,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        *,
        scale: Tensor,
        weight: Tensor | None,
        hyper: AdamWStep,
        first: int,
    ) -> None:
        """Update weights and moments in place. All tensors except `scale` are flat and of one length.

        Args:
            master: the weights that the optimizer keeps, fp32 or bf16, like the moments.
            grad: fp32 or bf16.
            scale: fp32 [], multiplies the gradient. If it is NaN, nothing is changed.
            weight: the model's bf16 copy of the weights, also written; None if `master` is the only copy.
            first: index of the range's first element in the whole parameter. Stochastic rounding depends only
                on the seed, the step and an element's index, so it is the same in every layout.
        """
        ...

    def sum_of_squares(self, tensors: list[Tensor]) -> Tensor:
        """Return the sum over all elements of all tensors, fp32 []."""
        ...


@dataclass(frozen=True)
class KernelSet:
    """All kernels that a model and its optimizer are built with: functions that fit the protocols above."""

    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    add_up: Callable[..., Tensor]
    linears: Callable[..., tuple[Tensor, ...]]
    swiglu: Callable[..., Tensor]
    latent_attention: Callable[..., Tensor]
    route: Callable[..., Choice]
    sequence_sums: Callable[..., SequenceSums]
    routed_experts: Callable[..., Tensor]
    late_gradients: Callable[..., LateGradients | None]
    rows_by_rank: Callable[..., tuple[RowMap, Tensor]]
    copy_rows: Callable[..., Tensor]
    sum_rows: Callable[..., Tensor]
    head_loss: Callable[..., Tensor]
    adamw: Callable[..., None]
    sum_of_squares: Callable[..., Tensor]


PROTOCOLS = (
    NormKernels,
    FeedForwardKernels,
    AttentionKernels,
    RouterKernels,
    ExpertKernels,
    HeadKernels,
    OptimizerKernels,
)
