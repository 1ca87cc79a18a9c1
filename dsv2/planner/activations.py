"""What one micro-batch's forward keeps for its backward, and what either needs beside it, in bytes.

One function a module, each a small table of the tensors that autograd keeps, so that a module whose
code changes has one table to change. `tests/unit/planner/test_activations.py` counts the real tensors.

The tables are for balanced routing: every rank's experts get `tokens x top-k` pairs, and as many rows
come to a rank as leave it.
"""

from typing import NamedTuple

from dsv2.config.schema import AttentionKind, Config, ModelConfig, Precision
from dsv2.kernels.specs import HEAD_CHUNK, KernelSpec, find_spec
from dsv2.moe.reach import mean_ranks

Table = dict[str, float]  # tensor: bytes
FP32, INT32, INT64 = 4, 4, 8  # bytes


class Pass(NamedTuple):
    """One micro-batch on one rank."""

    model: ModelConfig
    tokens: int
    itemsize: int  # bytes of an activation: 2 in bf16, 4 in fp32
    ep_size: int
    recompute: bool
    fused_norm: bool  # CUDA's one kernel; on CPU torch takes RMSNorm apart and keeps more
    kernels: KernelSpec = find_spec("reference")

    @property
    def fused(self) -> bool:
        return self.kernels.is_fused

    @property
    def whole_norm(self) -> bool:
        """Is RMSNorm one operation?"""
        return self.fused_norm or self.fused

    @property
    def cast(self) -> bool:
        """Is something in fp32 a copy?"""
        return self.itemsize != FP32

    @property
    def pairs(self) -> int:
        """Of a token and an expert, at the experts of this rank."""
        return self.tokens * self.model.num_experts_per_tok

    @property
    def rows(self) -> float:
        """Tokens that come to the experts of this rank, its own among them; as many are sent."""
        if self.ep_size == 1:
            return self.tokens
        return self.tokens * mean_ranks(self.model, self.ep_size, limited=True)

    @property
    def row(self) -> int:
        """Bytes of a hidden state."""
        return self.model.hidden_size * self.itemsize


def make_pass(config: Config, fused_norm: bool = True) -> Pass:
    parallel = config.parallel
    return Pass(
        model=config.model,
        tokens=config.runtime.micro_batch_size * config.data.sequence_length,
        itemsize=2 if config.runtime.precision is Precision.bf16 else 4,
        ep_size=parallel.expert_parallel_size,
        recompute=config.runtime.recompute,
        fused_norm=fused_norm,
        kernels=find_spec(config.runtime.kernels),
    )


def _norm(p: Pass, width: int) -> float:
    """RMSNorm's input and 1 / rms, and its output, which the matrix behind it keeps."""
    output = p.tokens * width * p.itemsize
    if p.whole_norm:
        return 2 * output + p.tokens * FP32
    # Taken apart: the input and the normalised input, both in fp32.
    return output + p.tokens * (2 * width + 1) * FP32


def attention(p: Pass) -> Table:
    """dsv2/model/attention/mla_module.py and grouped_module.py, with the norm before them."""
    m, t, a = p.model, p.tokens, p.itemsize
    heads = m.num_attention_heads
    table: Table = {"norm": _norm(p, m.hidden_size), "log-sum-exp": t * heads * FP32}
    if m.attention is not AttentionKind.mla:  # a key and a value are copied for every query head
        each = t * heads * m.qk_nope_head_dim * a
        return table | dict.fromkeys(("queries", "keys", "values", "output"), each)
    qk = m.qk_nope_head_dim + m.qk_rope_head_dim
    return table | {
        "query latent": _norm(p, m.q_lora_rank) if m.q_lora_rank else 0,
        # The fused norm's input is a view of the projection, the key's rotary part beside it.
        "key/value latent": _norm(p, m.kv_lora_rank) + p.fused * t * m.qk_rope_head_dim * a,
        "queries": t * heads * qk * a,
        "keys": t * heads * qk * a,
        # The values are a view of the up-projection, whose other half, k_nope, stays with them.
        "values": t * heads * (m.qk_nope_head_dim + m.v_head_dim) * a,
        "output": t * heads * m.v_head_dim * a,
    }


def _swiglu(p: Pass, width: int) -> float:
    """gate, up and, unless fused, silu(gate) and the product; the input is counted with its norm."""
    return (2 if p.fused else 4) * p.tokens * width * p.itemsize


def dense_ffn(p: Pass) -> Table:
    """The dense FFN of dsv2/moe/experts.py with the norm before it."""
    return {"norm": _norm(p, p.model.hidden_size), "ffn": _swiglu(p, p.model.intermediate_size)}


def moe(p: Pass) -> Table:
    """dsv2/moe/layer.py with the norm before it."""
    m, t = p.model, p.tokens
    table: Table = {"shared experts": _swiglu(p, m.n_shared_experts * m.moe_intermediate_size)}
    if p.fused:
        table["norm"] = _norm(p, m.hidden_size)
        table["router: affinities and ids"] = t * (m.n_routed_experts * FP32 + m.num_experts_per_tok * INT64)
    else:
        # In bf16 the router and the experts keep copies of the norm's output; then only the shared experts
        # keep the output itself.
        needed = m.n_shared_experts or not p.cast
        table["norm"] = _norm(p, m.hidden_size) - (0 if needed else t * p.row)
        table["router: input in fp32"] = p.cast * t * m.hidden_size * FP32
        table["router: centroids in fp32"] = p.cast * m.n_routed_experts * m.hidden_size * FP32
        # The chosen ids are a view of the sort over all experts.
        table["router: affinities and ids"] = t * m.n_routed_experts * (FP32 + INT64)
    if p.ep_size > 1:
        # The rows' order is a view of the sort over all ranks.
        table["dispatch: indices"] = (t * p.ep_size + (1 if p.fused else 2) * p.rows) * INT64
    return table | (_fused_experts(p) if p.fused else _reference_experts(p))


def _reference_experts(p: Pass) -> Table:
    """dsv2/kernels/reference/experts.py; `combine` of dsv2/moe/dispatch.py keeps next to nothing."""
    m = p.model
    width = p.pairs * m.moe_intermediate_size * p.itemsize
    return {
        "experts: indices": p.pairs * INT64,
        "experts: rows": p.pairs * p.row,
        "experts: gate and up": 2 * width,
        "experts: silu, product": 2 * width,
        # Slots and the order of their rows; three numbers a bag.
        "sums: indices": (2 * p.pairs + 3 * p.rows) * INT64,
        "sums: in fp32": p.pairs * m.hidden_size * FP32,
        "sums: weights": p.pairs * FP32,
    }


def _fused_experts(p: Pass) -> Table:
    """dsv2/kernels/fused/experts.py or experts_cute.py; `combine` keeps nothing."""
    m = p.model
    slots = p.rows * m.num_experts_per_tok
    return {
        "experts: indices": p.pairs * INT64 + slots * INT32,
        "experts: rows": p.pairs * p.row,
        "experts: gate and up": 2 * p.pairs * m.moe_intermediate_size * p.itemsize,
        "experts: weights": (slots + p.kernels.keeps_pair_weights * p.pairs) * FP32,
    }


def head(p: Pass) -> Table:
    """The last norm, the output head and its cross-entropy: reference/head.py or fused/head.py."""
    m, t = p.model, p.tokens
    norm = _norm(p, m.hidden_size)
    if p.fused:  # what it needs of the norm's output is in the gradients
        return {
            "norm": norm - t * p.row,
            "ids and labels": 2 * t * INT64,
            "gradients": (t + m.vocab_size) * p.row,
        }
    return {"norm": norm, "ids and labels": 2 * t * INT64, "log-probabilities": t * m.vocab_size * FP32}


def _logits(p: Pass) -> float:
    """Bytes at the head's fullest moment."""
    m, t = p.model, p.tokens
    if not p.fused:
        # With the log-probabilities the logits' gradient, and their own before it, the matrix's after it.
        logits, matrix = t * m.vocab_size * FP32, m.vocab_size * m.hidden_size * p.itemsize
        product = sum(head(p).values()) + logits + max(logits, matrix)
        # The last norm taken apart: its input, 1 / rms, and five of its gradient's terms.
        return max(product, 0 if p.whole_norm else t * (6 * m.hidden_size + 1) * FP32)
    # Forward: the matrix's gradient and beside it a chunk's logits; where it is the sum of several chunks'
    # it is in fp32, and in the end cast. Backward: both gradients times the loss's.
    norm, weight = _norm(p, m.hidden_size) + 2 * t * INT64, m.vocab_size * m.hidden_size
    logits = min(HEAD_CHUNK, t) * m.vocab_size * p.itemsize
    total = weight * p.itemsize + logits
    if t > HEAD_CHUNK:
        total = weight * FP32 + max(logits, weight * p.itemsize)
    gradients = (t + m.vocab_size) * p.row
    return norm + max(t * (p.row + FP32) + total, 2 * gradients - t * p.row)


def _attention_workspace(p: Pass) -> float:
    """Gradients of queries, keys and values, and of the projections they are cut from.

    Fused those of the projections come when what was kept is gone: with the former is the output's, and
    where FlashAttention-4 adds the queries' up in fp32 that sum.
    """
    m = p.model
    qk, v = m.qk_nope_head_dim + m.qk_rope_head_dim, m.v_head_dim
    kv = m.qk_nope_head_dim + v
    if m.attention is not AttentionKind.mla:
        qk = v = m.qk_nope_head_dim
        kv = 0
    each = p.tokens * m.num_attention_heads
    if p.fused and m.attention is AttentionKind.mla:
        return each * (2 * (qk + v) * p.itemsize + p.kernels.sums_query_gradients_in_fp32 * qk * FP32)
    return each * (3 * qk + v + kv) * p.itemsize


def _swiglu_workspace(p: Pass, width: int) -> float:
    """Gradients of the product and, unless fused, of silu(gate).

    Fused the product's is gone when that of the input and the last of the three matrices' are there.
    """
    product, matrix = p.tokens * width * p.itemsize, width * p.row
    return max(product + matrix, p.tokens * p.row + 3 * matrix) if p.fused else 2 * product


def _stream(p: Pass) -> float:
    """The residual stream's gradient, and torch's norm in fp32."""
    return p.tokens * (p.row + (0 if p.fused else p.model.hidden_size * FP32))


def _dense_workspace(p: Pass) -> float:
    """What a dense FFN needs at its fullest, beyond the layer's own tables."""
    return _swiglu_workspace(p, p.model.intermediate_size) + _stream(p)


def _moe_workspace(p: Pass) -> float:
    """What an MoE layer needs at its fullest, beyond the layer's own tables.

    The routed experts' backward runs first, then the shared ones'; each frees what it kept as it goes.
    """
    m = p.model
    table = moe(p)
    freed = sum(size for name, size in table.items() if name.startswith(("experts", "sums")))
    shared = _swiglu_workspace(p, m.n_shared_experts * m.moe_intermediate_size) if m.n_shared_experts else 0
    if p.fused:  # with what the routed experts gave, or what is on its way from their ranks
        shared += p.rows * p.row * (1 if p.ep_size == 1 else 2)
    routed = _fused_workspace(p) if p.fused else _reference_workspace(p, table)
    forward = _fused_forward(p) if p.fused else _reference_forward(p)
    if p.recompute:  # then the stream's gradient is there
        forward += p.tokens * p.row
    return max(max(shared - freed, routed) + _stream(p), forward)


def _reference_workspace(p: Pass, table: Table) -> float:
    """`combine`, then the sums in fp32, then the experts.

    The experts' gradients exist one by one until the last expert is done, and are then stacked, first
    w2's and then w13's: 3 + 1 and 2 + 2 matrices an expert.
    """
    m = p.model
    combine = 0.0
    sums = p.pairs * m.hidden_size * FP32  # the gradients of their terms
    if p.ep_size > 1:
        combine = p.rows * m.hidden_size * FP32 + p.cast * p.rows * p.row
        sums += p.rows * (p.row + p.cast * m.hidden_size * FP32)
    # Then the rows' gradients have taken the rows' place.
    freed = sum(size for name, size in table.items() if name.startswith("sums"))
    freed += table["experts: gate and up"] + table["experts: silu, product"]
    return max(combine, sums, 4 * _expert_matrices(p) - freed)


def _reference_forward(p: Pass) -> float:
    """The experts' outputs one by one and in one; or their sums, then cast; or `combine`; or all added up.

    With the attention's output, the shared experts' or, where it is not kept, the norm's, the answers to the
    rows that came or these themselves, and, where its norm keeps but an fp32 copy, the residual stream before
    the attention, which a checkpoint keeps, and behind it.
    """
    m, t = p.model, p.tokens
    fp32, came = m.hidden_size * FP32, 0 if p.ep_size == 1 else p.rows * p.row
    outputs = p.pairs * p.row
    sums = p.cast * (outputs + p.rows * p.row) + p.rows * fp32
    # Of `combine` the rows that came home, fp32 copies of them, their sums, then cast.
    combine = came + p.cast * (p.rows * fp32 + t * p.row) + t * fp32 if came else 0
    added = t * p.row * (3 if m.n_shared_experts else 2)
    others = 1 + (m.n_shared_experts > 0 or p.cast) + p.cast * (1 if p.recompute else 2)
    return max(0 if p.cast else outputs, sums, combine, added) + came + others * t * p.row


def _fused_workspace(p: Pass) -> float:
    """The backward of dsv2/kernels/fused/experts.py or experts_cute.py.

    At the gradient of w2 there are those of the outputs and of the product; at the input's those of both
    weights, of the pairs and of the rows. Those of gate and up take the places of gate and up, or with
    experts_cute.py their own.
    """
    width = p.pairs * p.model.moe_intermediate_size * p.itemsize
    matrix, pairs, rows = _expert_matrices(p), p.pairs * p.row, p.rows * p.row
    fullest = max(pairs + width + matrix, pairs + rows + 3 * matrix)
    fullest += 0 if p.kernels.overwrites_gate_and_up else 2 * width
    return fullest + (0 if p.ep_size == 1 else rows)  # with the gradient that came


def _fused_forward(p: Pass) -> float:
    """The product, the outputs and their sums, with the attention's output, the shared experts' and the rows
    that came."""
    m = p.model
    rows = p.rows * p.row * (1 if p.ep_size == 1 else 2)
    others = p.tokens * p.row * (2 if m.n_shared_experts else 1)
    return p.pairs * (p.row + m.moe_intermediate_size * p.itemsize) + rows + others


def _held_orders(p: Pass) -> float:
    """The orders of rows, which the fused kernels hold past a checkpoint: they are no saved tensors."""
    if not p.fused:
        return 0
    ranks = 0 if p.ep_size == 1 else p.tokens * p.ep_size
    return (p.pairs + ranks) * INT64


def _expert_matrices(p: Pass) -> float:
    """Bytes of one of this rank's experts' three matrices, of all its experts."""
    m = p.model
    return m.n_routed_experts // p.ep_size * m.hidden_size * m.moe_intermediate_size * p.itemsize


class Activations(NamedTuple):
    """Bytes a rank needs for one micro-batch beside its model states."""

    kept: float  # by the layers, until their backward
    logits: float  # beside them at the head
    layers: float  # at the fullest moment of a layer, with what others keep
    single: float  # of them at the fullest moment of one layer, with nothing of others

    @property
    def peak(self) -> float:
        """`kept` and what its fullest moment adds to it."""
        return max(self.kept + self.logits, self.layers)


def activations(p: Pass) -> Activations:
    """Bytes at the fullest moment of a forward and backward.

    That moment is either at the head, when every layer's tensors are kept, or a layer's.
    """
    m = p.model
    dense_layers = min(m.first_k_dense_replace, m.num_hidden_layers)
    moe_layers = m.num_hidden_layers - dense_layers
    attended, dense, mixture = (sum(table(p).values()) for table in (attention, dense_ffn, moe))
    mixed, held = _moe_workspace(p), _held_orders(p)
    dense_fullest = dense + _dense_workspace(p) if dense_layers else 0
    attention_fullest = _attention_workspace(p) + p.fused * _stream(p)
    if p.recompute:  # a layer keeps its input alone, and makes the rest anew in its backward
        kept = m.num_hidden_layers * p.tokens * p.row + moe_layers * held
        attended -= p.tokens * p.row if p.whole_norm or not p.cast else 0  # which has its input
        mixed_fullest = mixture - held + mixed if moe_layers else 0
        single = attended + max(mixed_fullest, dense_fullest, attention_fullest)
        return Activations(kept, _logits(p), kept + single, single)
    dense_kept = dense_layers * (attended + dense)
    kept = dense_kept + moe_layers * (attended + mixture)
    mixed_fullest = mixture + mixed if moe_layers else 0
    # In the last layer, where all before it is still kept; or in the last dense one.
    last = kept + max(mixed, attention_fullest - mixture) if moe_layers else 0
    layers = max(last, dense_kept + dense_fullest - dense)
    return Activations(
        kept, _logits(p), layers, attended + max(mixed_fullest, dense_fullest, attention_fullest)
    )
