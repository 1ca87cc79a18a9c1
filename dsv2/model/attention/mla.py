"""Multi-head Latent Attention (arXiv 2405.04434, section 2.1): sizes, checks and memory.

mla_module.py computes it.
"""

from typing import TYPE_CHECKING, Any

from dsv2.config.rules import refuse, require_positive
from dsv2.config.schema import ModelConfig
from dsv2.kernels.specs import HeadWidths
from dsv2.model.attention.base import AttentionKind
from dsv2.parallel.micro_batch import FP32, MicroBatch, Table

if TYPE_CHECKING:
    from dsv2.kernels.sets import KernelSet
    from dsv2.model.attention.mla_module import MultiHeadLatentAttention


class MultiHeadLatent(AttentionKind):
    """Keys and values of all heads come from one compressed latent per token."""

    name = "mla"

    def check(self, model: ModelConfig) -> None:
        require_positive(
            "model", model, ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        )
        if model.q_lora_rank is not None:
            if model.q_lora_rank < 1:
                right = "must be at least 1, or null for no compression"
                refuse("model.q_lora_rank", model.q_lora_rank, right)
            require_positive("model", model, ["q_lora_rank"])
        if model.qk_rope_head_dim % 2:
            refuse("model.qk_rope_head_dim", model.qk_rope_head_dim, "must be even: RoPE rotates pairs")
        self.require_no_key_value_heads(model)

    def parameters(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        hidden = model.hidden_size
        heads = model.num_attention_heads
        q_width = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
        up_width = heads * (model.qk_nope_head_dim + model.v_head_dim)
        query: dict[str, tuple[int, ...]] = {"q_proj.weight": (q_width, hidden)}
        if model.q_lora_rank is not None:
            query = {
                "q_a_proj.weight": (model.q_lora_rank, hidden),
                "q_a_layernorm.weight": (model.q_lora_rank,),
                "q_b_proj.weight": (q_width, model.q_lora_rank),
            }
        return query | {
            "kv_a_proj_with_mqa.weight": (model.kv_lora_rank + model.qk_rope_head_dim, hidden),
            "kv_a_layernorm.weight": (model.kv_lora_rank,),
            "kv_b_proj.weight": (up_width, model.kv_lora_rank),
            "o_proj.weight": (hidden, heads * model.v_head_dim),
        }

    def rotary_width(self, model: ModelConfig) -> int:
        return model.qk_rope_head_dim

    def score_width(self, model: ModelConfig) -> int:
        return model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim

    def cached_elements(self, model: ModelConfig) -> int:
        return model.kv_lora_rank + model.qk_rope_head_dim

    def latent_heads(self, model: ModelConfig) -> HeadWidths:
        rotary = model.qk_rope_head_dim
        return HeadWidths(rotary, model.qk_nope_head_dim + rotary, model.v_head_dim)

    def kept_bytes(self, run: MicroBatch) -> Table:
        model = run.model
        per_head = run.tokens * model.num_attention_heads
        qk = model.qk_nope_head_dim + model.qk_rope_head_dim
        rotary_key = run.tokens * model.qk_rope_head_dim * run.itemsize
        return {
            "log-sum-exp": per_head * FP32,
            "query latent": run.norm_bytes(model.q_lora_rank) if model.q_lora_rank else 0,
            # The fused norm's input is a view of the projection, which also holds the key's rotary part.
            "key/value latent": run.norm_bytes(model.kv_lora_rank) + (rotary_key if run.fused else 0),
            "queries": per_head * qk * run.itemsize,
            "keys": per_head * qk * run.itemsize,
            # The values are a view of the up-projection. So its other half, k_nope, is kept too.
            "values": per_head * (model.qk_nope_head_dim + model.v_head_dim) * run.itemsize,
            "output": per_head * model.v_head_dim * run.itemsize,
        }

    def peak_bytes(self, run: MicroBatch) -> float:
        """Return the bytes of the gradients of queries, keys, values and the projections that contain them.

        The fused kernels compute the projections' gradients after the kept tensors are freed. They also need
        the output's gradient. FlashAttention-4 sums the queries' gradient in fp32.
        """
        model = run.model
        qk = model.qk_nope_head_dim + model.qk_rope_head_dim
        value = model.v_head_dim
        per_head = run.tokens * model.num_attention_heads
        if run.fused:
            query_sums = run.kernels.sums_query_gradients_in_fp32 * qk * FP32
            return per_head * (2 * (qk + value) * run.itemsize + query_sums)
        return per_head * (3 * qk + value + model.qk_nope_head_dim + value) * run.itemsize

    def published(self, model: ModelConfig) -> dict[str, Any]:
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        fields = {name: getattr(model, name) for name in names}
        return fields | self.published_defaults(model)

    def published_defaults(self, model: ModelConfig) -> dict[str, Any]:
        return {"num_key_value_heads": model.num_attention_heads, "attention_bias": False}

    def build(self, model: ModelConfig, kernels: "KernelSet") -> "MultiHeadLatentAttention":
        from dsv2.model.attention.mla_module import MultiHeadLatentAttention

        return MultiHeadLatentAttention(model, kernels)
