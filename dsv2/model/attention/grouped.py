"""MHA, GQA and MQA, which the paper compares MLA with (appendix D): sizes, checks and memory.

All heads are qk_nope_head_dim wide, and RoPE rotates the whole head. grouped_module.py computes.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from dsv2.config.rules import divisors, refuse, require_positive
from dsv2.config.schema import ModelConfig
from dsv2.model.attention.base import AttentionKind
from dsv2.parallel.micro_batch import FP32, MicroBatch, Table

if TYPE_CHECKING:
    from dsv2.kernels.sets import KernelSet
    from dsv2.model.attention.grouped_module import GroupedQueryAttention


class Grouped(AttentionKind):
    """Each key and value head serves as many query heads as every other."""

    @abstractmethod
    def key_value_heads(self, model: ModelConfig) -> int:
        """Return the number of key and value heads."""

    def check(self, model: ModelConfig) -> None:
        require_positive("model", model, ["qk_nope_head_dim"])
        self._check_key_value_heads(model)
        if model.v_head_dim != model.qk_nope_head_dim:
            refuse(
                "model.v_head_dim",
                model.v_head_dim,
                f"must be model.qk_nope_head_dim={model.qk_nope_head_dim} with model.attention={self.name}: "
                "its heads have one width",
            )
        if model.qk_nope_head_dim % 2:
            refuse(
                "model.qk_nope_head_dim",
                model.qk_nope_head_dim,
                f"must be even with model.attention={self.name}: RoPE rotates pairs of the whole head",
            )

    def _check_key_value_heads(self, model: ModelConfig) -> None:
        self.require_no_key_value_heads(model)

    def parameters(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        hidden = model.hidden_size
        q_width = model.num_attention_heads * model.qk_nope_head_dim
        kv_width = self.key_value_heads(model) * model.qk_nope_head_dim
        return {
            "q_proj.weight": (q_width, hidden),
            "k_proj.weight": (kv_width, hidden),
            "v_proj.weight": (kv_width, hidden),
            "o_proj.weight": (hidden, q_width),
        }

    def rotary_width(self, model: ModelConfig) -> int:
        return model.qk_nope_head_dim

    def score_width(self, model: ModelConfig) -> int:
        return 2 * model.qk_nope_head_dim

    def cached_elements(self, model: ModelConfig) -> int:
        return 2 * self.key_value_heads(model) * model.qk_nope_head_dim

    def kept_bytes(self, run: MicroBatch) -> Table:
        """Return queries, keys, values and output; keys and values are copied for every query head."""
        per_head = run.tokens * run.model.num_attention_heads
        each = per_head * run.model.qk_nope_head_dim * run.itemsize
        return {
            "log-sum-exp": per_head * FP32,
            "queries": each,
            "keys": each,
            "values": each,
            "output": each,
        }

    def peak_bytes(self, run: MicroBatch) -> float:
        """Return the gradients of queries, keys and values, and of the queries before rotation."""
        return 4 * run.tokens * run.model.num_attention_heads * run.model.qk_nope_head_dim * run.itemsize

    def published(self, model: ModelConfig) -> dict[str, Any]:
        right = "Hugging Face's DeepseekV2ForCausalLM has no such attention; it takes mla only"
        refuse("model.attention", self.name, right)

    def build(self, model: ModelConfig, kernels: "KernelSet") -> "GroupedQueryAttention":
        from dsv2.model.attention.grouped_module import GroupedQueryAttention

        return GroupedQueryAttention(model, self.key_value_heads(model))


class MultiHead(Grouped):
    """A key and a value head for every query head."""

    name = "mha"

    def key_value_heads(self, model: ModelConfig) -> int:
        return model.num_attention_heads


class GroupedQuery(Grouped):
    """num_key_value_heads key and value heads."""

    name = "gqa"

    def key_value_heads(self, model: ModelConfig) -> int:
        assert model.num_key_value_heads is not None, "check() refuses this"
        return model.num_key_value_heads

    def _check_key_value_heads(self, model: ModelConfig) -> None:
        heads = model.num_attention_heads
        groups = model.num_key_value_heads
        if groups is None or groups < 1 or heads % groups:
            refuse(
                "model.num_key_value_heads",
                groups,
                f"must divide model.num_attention_heads={heads} with model.attention=gqa: "
                f"one of {divisors(heads)}",
            )


class MultiQuery(Grouped):
    """One key head and one value head for all query heads."""

    name = "mqa"

    def key_value_heads(self, model: ModelConfig) -> int:
        return 1
