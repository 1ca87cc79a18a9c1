"""What one micro-batch's forward keeps for its backward, and what the backward needs beside it, in bytes.

One function a module, each a small table of the tensors that autograd keeps, so that a module whose
code changes has one table to change. `tests/unit/test_plan_activations.py` counts the real tensors.

The tables are for balanced routing: every rank's experts get `tokens x top-k` rows.
"""

from typing import NamedTuple

from dsv2.config import Config, ModelConfig, Precision

Table = dict[str, float]  # tensor: bytes
FP32, INT64 = 4, 8  # bytes


class Pass(NamedTuple):
    """One micro-batch on one rank."""

    model: ModelConfig
    tokens: int
    itemsize: int  # bytes of an activation: 2 in bf16, 4 in fp32
    ep_size: int
    recompute: bool
    fused_norm: bool  # CUDA's one kernel; on CPU torch takes RMSNorm apart and keeps more


def make_pass(config: Config, fused_norm: bool = True) -> Pass:
    parallel = config.parallel
    return Pass(
        model=config.model,
        tokens=parallel.micro_batch_size * config.data.sequence_length,
        itemsize=2 if parallel.precision is Precision.bf16 else 4,
        ep_size=parallel.expert_parallel_size,
        recompute=parallel.activation_checkpointing,
        fused_norm=fused_norm,
    )


def _norm(p: Pass, width: int) -> float:
    """RMSNorm's input and 1 / rms, and its output, which the matrix behind it keeps."""
    output = p.tokens * width * p.itemsize
    if p.fused_norm:
        return 2 * output + p.tokens * FP32
    # Taken apart: the input and the normalised input, both in fp32.
    return output + p.tokens * (2 * width + 1) * FP32


def attention(p: Pass) -> Table:
    """dsv2/model/mla.py with the norm before it."""
    m, t, a = p.model, p.tokens, p.itemsize
    heads, qk = m.num_attention_heads, m.qk_nope_head_dim + m.qk_rope_head_dim
    return {
        "norm": _norm(p, m.hidden_size),
        "query latent": _norm(p, m.q_lora_rank) if m.q_lora_rank else 0,
        "key/value latent": _norm(p, m.kv_lora_rank),
        "queries": t * heads * qk * a,
        "keys": t * heads * qk * a,
        # The values are a view of the up-projection, whose other half, k_nope, stays with them.
        "values": t * heads * (m.qk_nope_head_dim + m.v_head_dim) * a,
        "output": t * heads * m.v_head_dim * a,
        "log-sum-exp": t * heads * FP32,
    }


def _swiglu(p: Pass, width: int) -> float:
    """gate, silu(gate), up and their product; the input is counted with its norm."""
    return 4 * p.tokens * width * p.itemsize


def dense_ffn(p: Pass) -> Table:
    """The dense FFN of dsv2/moe/experts.py with the norm before it."""
    return {"norm": _norm(p, p.model.hidden_size), "ffn": _swiglu(p, p.model.intermediate_size)}


def moe(p: Pass) -> Table:
    """dsv2/moe/layer.py with the norm before it."""
    m, t, a = p.model, p.tokens, p.itemsize
    rows, experts = t * m.num_experts_per_tok, m.n_routed_experts
    copies = a != FP32  # what the router casts to fp32, it keeps
    # Then only the shared experts keep the norm's own output.
    dropped = t * m.hidden_size * a if copies and not m.n_shared_experts else 0
    return {
        "norm": _norm(p, m.hidden_size) - dropped,
        "router: input in fp32": copies * t * m.hidden_size * FP32,
        "router: centroids in fp32": copies * experts * m.hidden_size * FP32,
        # The chosen ids are a view of the sort over all experts.
        "router: affinities and ids": t * experts * (FP32 + INT64),
        "dispatch: indices": rows * (2 + (p.ep_size > 1)) * INT64,
        "experts: rows": rows * m.hidden_size * a,
        "experts: gate and up": 2 * rows * m.moe_intermediate_size * a,
        "experts: silu, product": 2 * rows * m.moe_intermediate_size * a,
        # index_copy keeps its source: once on the way home, once in place.
        "combine: outputs": (1 + (p.ep_size > 1)) * rows * m.hidden_size * a,
        "combine: in fp32": rows * m.hidden_size * FP32,
        "combine: weights": rows * FP32,
        "shared experts": _swiglu(p, m.n_shared_experts * m.moe_intermediate_size),
    }


def head(p: Pass) -> Table:
    """The last norm, the logits and their cross-entropy in dsv2/model/transformer.py."""
    return {
        "norm": _norm(p, p.model.hidden_size),
        "log-probabilities": p.tokens * p.model.vocab_size * FP32,
        "ids and labels": 2 * p.tokens * INT64,
    }


def _attention_workspace(p: Pass) -> float:
    """Gradients of queries, keys and values, and of the projections they are cut from."""
    m = p.model
    qk, kv = m.qk_nope_head_dim + m.qk_rope_head_dim, m.qk_nope_head_dim + m.v_head_dim
    return p.tokens * m.num_attention_heads * (3 * qk + m.v_head_dim + kv) * p.itemsize


def _dense_workspace(p: Pass) -> float:
    """Gradients of the dense FFN's product and of silu(gate), and the residual stream's."""
    m = p.model
    return p.tokens * (2 * m.intermediate_size * p.itemsize + m.hidden_size * (p.itemsize + FP32))


def _moe_workspace(p: Pass) -> float:
    """What an MoE layer's backward needs at its fullest, beyond the layer's own tables.

    The shared experts' backward runs first, then `combine` in fp32, then the experts; each frees what
    it kept as it goes. The experts' gradients exist one by one until the last expert is done, and are
    then stacked, first w2's and then w13's: 3 + 1 and 2 + 2 matrices an expert.
    """
    m, t, a = p.model, p.tokens, p.itemsize
    table = moe(p)
    shared = 2 * t * m.n_shared_experts * m.moe_intermediate_size * a
    freed = table["shared experts"]
    combine = 2 * t * m.num_experts_per_tok * m.hidden_size * FP32 - freed
    freed += sum(size for name, size in table.items() if name.startswith("combine"))
    freed += table["experts: gate and up"] + table["experts: silu, product"]
    matrix = m.n_routed_experts // p.ep_size * m.hidden_size * m.moe_intermediate_size
    weights = 4 * matrix * a + table["experts: rows"] - freed
    return max(shared, combine, weights) + t * m.hidden_size * (a + FP32)


class Activations(NamedTuple):
    """Bytes a rank needs for one micro-batch beside its model states."""

    kept: float  # by the layers, until their backward
    peak: float  # `kept` and what its fullest moment adds to it
    logits: float  # of the peak, at the moment of the logits' backward


def activations(p: Pass) -> Activations:
    """Bytes at the fullest moment of a forward and backward.

    That moment is either the logits' backward, when every layer's tensors are kept and the fp32
    log-probabilities, their gradient and the logits' gradient stand side by side, or a layer's.
    """
    m = p.model
    dense_layers = min(m.first_k_dense_replace, m.num_hidden_layers)
    moe_layers = m.num_hidden_layers - dense_layers
    attended, dense, mixture = (sum(table(p).values()) for table in (attention, dense_ffn, moe))
    logits = sum(head(p).values()) + 2 * p.tokens * m.vocab_size * FP32
    layer = _moe_workspace(p)
    if p.recompute:  # a layer keeps its input alone, and makes the rest anew in its backward
        kept = m.num_hidden_layers * p.tokens * m.hidden_size * p.itemsize
        ffn = max(mixture + layer, (dense + _dense_workspace(p)) if dense_layers else 0)
        layer = attended + max(ffn, _attention_workspace(p))
    else:
        kept = m.num_hidden_layers * attended + dense_layers * dense + moe_layers * mixture
    return Activations(kept, kept + max(logits, layer), logits)
