"""MHA, GQA and MQA, with which the paper compares MLA (appendix D): sizes, checks and memory.

All heads are qk_nope_head_dim wide, and RoPE rotates whole heads. grouped_module.py computes the attention.
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
    """Every key and value head serves the same number of query heads."""

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
                "keys and values have the same width",
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
        """Return the bytes of each kept tensor. Keys and values are copied for every query head."""
        per_head = run.tokens * run.model.num_attention_heads
        tensor_bytes = per_head * run.model.qk_nope_head_dim * run.itemsize
        return {
            "log-sum-exp": per_head * FP32,
            "queries": tensor_bytes,
            "keys": tensor_bytes,
            "values": tensor_bytes,
            "output": tensor_bytes,
        }

    def peak_bytes(self, run: MicroBatch) -> float:
        """Return the bytes of the gradients of queries, keys, values, and of the queries before rotation."""
        return 4 * run.tokens * run.model.num_attention_heads * run.model.qk_nope_head_dim * run.itemsize

    def published(self, model: ModelConfig) -> dict[str, Any]:
        right = "must be mla, the only attention of Hugging Face's DeepseekV2ForCausalLM"
        refuse("model.attention", self.name, right)

    def build(self, model: ModelConfig, kernels: "KernelSet") -> "GroupedQueryAttention":
        from dsv2.model.attention.grouped_module import GroupedQueryAttention

        return GroupedQueryAttention(model, self.key_value_heads(model))


class MultiHead(Grouped):
    """Every query head has its own key head and value head."""

    name = "mha"

    def key_value_heads(self, model: ModelConfig) -> int:
        return model.num_attention_heads


class GroupedQuery(Grouped):
    """`num_key_value_heads` key heads, and as many value heads, serve all query heads in equal groups."""

    name = "gqa"

    def key_value_heads(self, model: ModelConfig) -> int:
        assert model.num_key_value_heads is not None, "check() refuses null"
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
    """One key head and one value head serve all query heads."""

    name = "mqa"

    def key_value_heads(self, model: ModelConfig) -> int:
        return 1
