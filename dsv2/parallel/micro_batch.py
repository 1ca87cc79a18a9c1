"""The sizes of one micro-batch on one rank: the input of every table of activation bytes.

Each part of the model has a torch-free spec whose `kept_bytes` takes a `MicroBatch`.
dsv2/planner/activations.py sums the tables. Routing is assumed to be balanced: the experts of every rank get
tokens x experts-per-token pairs, and as many rows arrive as leave.
"""

from typing import NamedTuple

from dsv2.config.schema import Config, ModelConfig, Precision
from dsv2.kernels.specs import KernelSpec, find_spec

Table = dict[str, float]  # name of a tensor: its bytes

# Bytes of one element.
FP32 = 4
INT32 = 4
INT64 = 8

ROW_ALIGNMENT = 16  # bytes; rows of the symmetric buffer begin at multiples of it


class MicroBatch(NamedTuple):
    """The work of one rank in one forward and backward pass."""

    model: ModelConfig
    tokens: int
    itemsize: int  # bytes of an activation: 2 in bf16, 4 in fp32
    ep_size: int
    recompute: bool  # is each layer recomputed in the backward pass?
    fused_norm: bool  # True on CUDA; on the CPU, torch composes RMSNorm from several kernels and keeps more
    kernels: KernelSpec = find_spec("reference")
    ranks_per_token: float = 1.0  # mean number of ranks with a token's experts: `Router.mean_ranks`

    @property
    def fused(self) -> bool:
        """Return whether fused kernels compute the costly operations."""
        return self.kernels.is_fused

    @property
    def whole_norm(self) -> bool:
        """Return whether one kernel computes RMSNorm."""
        return self.fused_norm or self.fused

    @property
    def cast(self) -> bool:
        """Return whether an activation must be copied to become fp32."""
        return self.itemsize != FP32

    @property
    def pairs(self) -> int:
        """Return the number of (token, expert) pairs that this rank's experts compute."""
        return self.tokens * self.model.num_experts_per_tok

    @property
    def rows(self) -> float:
        """Return the number of rows that this rank's experts receive, including those from this rank.

        The rank sends as many rows as it receives.
        """
        return self.tokens * self.ranks_per_token

    @property
    def row(self) -> int:
        """Return the bytes of one hidden state."""
        return self.model.hidden_size * self.itemsize

    def norm_bytes(self, width: int) -> float:
        """Return the bytes of RMSNorm's input, its 1 / rms, and its output, which the next matrix keeps."""
        output = self.tokens * width * self.itemsize
        if self.whole_norm:
            return 2 * output + self.tokens * FP32
        # Composed of several operations: the input and the normalised input, both in fp32.
        return output + self.tokens * (2 * width + 1) * FP32


def micro_batch(config: Config, ranks_per_token: float, fused_norm: bool = True) -> MicroBatch:
    """Return the micro-batch that `config` describes."""
    return MicroBatch(
        model=config.model,
        tokens=config.runtime.micro_batch_size * config.data.sequence_length,
        itemsize=2 if config.runtime.precision is Precision.bf16 else FP32,
        ep_size=config.parallel.expert_parallel_size,
        recompute=config.runtime.recompute,
        fused_norm=fused_norm,
        kernels=find_spec(config.runtime.kernels),
        ranks_per_token=ranks_per_token,
    )
