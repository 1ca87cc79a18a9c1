"""Bytes that the feed-forward networks keep for the backward pass and need at their peak. Imports no torch.

Each table lists the tensors that autograd keeps. If a module changes, only its table changes.
`tests/unit/planner/test_activations.py` counts the real tensors.
"""

from dsv2.moe.routers.kinds import router_of
from dsv2.parallel.micro_batch import FP32, INT32, INT64, ROW_ALIGNMENT, MicroBatch, Table


def dense_ffn(run: MicroBatch) -> Table:
    """Return the bytes of each tensor that a dense FFN and the norm before it keep."""
    model = run.model
    return {"norm": run.norm_bytes(model.hidden_size), "ffn": _swiglu(run, model.intermediate_size)}


def dense_peak(run: MicroBatch) -> float:
    """Return the peak bytes that a dense FFN needs beyond its layer's kept tensors."""
    return _swiglu_peak(run, run.model.intermediate_size) + stream_peak(run)


def moe(run: MicroBatch) -> Table:
    """Return the bytes of each tensor that dsv2/moe/layer.py and the norm before it keep."""
    model = run.model
    norm = run.norm_bytes(model.hidden_size)
    if not run.fused and run.cast and not model.n_shared_experts:
        # In bf16 the router and the experts keep copies of the norm's output. Only the shared experts keep
        # the output itself.
        norm -= run.tokens * run.row
    table: Table = {"norm": norm, "shared experts": _swiglu(run, _shared_width(run))}
    table |= router_of(model).kept_bytes(run)
    if run.ep_size > 1:  # each (token, rank) slot in the rows' order, and the row of each slot
        table["dispatch: indices"] = run.tokens * run.ep_size * (INT64 + INT32)
    return table | (_fused_experts(run) if run.fused else _reference_experts(run))


def moe_peak(run: MicroBatch) -> float:
    """Return the peak bytes that an MoE layer needs beyond its kept tensors.

    With one rank, the routed experts' backward pass runs first and frees its kept tensors, then the shared
    experts'. With several ranks the shared experts' runs first, while the results' gradients travel.
    """
    model = run.model
    table = moe(run)
    shared = _swiglu_peak(run, _shared_width(run)) if model.n_shared_experts else 0
    freed = 0.0
    if run.ep_size == 1:
        freed = sum(size for name, size in table.items() if name.startswith(("experts", "sums")))
        shared += run.fused * run.rows * run.row  # the rows' gradients exist too
    else:
        shared += 2 * run.rows * run.row  # what is sent, and what arrives
    routed = _fused_backward(run) if run.fused else _reference_backward(run, table)
    forward = _fused_forward(run) if run.fused else _reference_forward(run)
    if run.recompute:  # the stream's gradient exists during the second forward pass
        forward += run.tokens * run.row
        if run.ep_size == 1 and run.cast and not run.fused:  # and that of the sums, which starts it
            forward += run.rows * model.hidden_size * FP32
    return max(max(shared - freed, routed) + stream_peak(run), forward)


def symmetric_buffer(run: MicroBatch) -> tuple[int, int]:
    """Return the rows of one half of a rank's symmetric buffer, and the bytes of a row.

    There is room for the worst case, in which every token of the group goes to one rank.
    """
    row = run.row + 2 * run.model.num_experts_per_tok * FP32
    return run.ep_size * run.tokens, -(-row // ROW_ALIGNMENT) * ROW_ALIGNMENT


def stream_peak(run: MicroBatch) -> float:
    """Return the bytes of the residual stream's gradient and, unless fused, of torch's norm in fp32."""
    return run.tokens * (run.row + (0 if run.fused else run.model.hidden_size * FP32))


def _shared_width(run: MicroBatch) -> int:
    return run.model.n_shared_experts * run.model.moe_intermediate_size


def _swiglu(run: MicroBatch, width: int) -> float:
    """Return the bytes of gate, up and, unless fused, silu(gate) and the product.

    The norm's table counts the input.
    """
    return (2 if run.fused else 4) * run.tokens * width * run.itemsize


def _swiglu_peak(run: MicroBatch, width: int) -> float:
    """Return the peak bytes of a SwiGLU's backward pass.

    In the reference pass the gradients of the product and of silu(gate) exist together. The fused pass frees
    the product's gradient before it computes the gradients of the input and of the other two matrices.
    """
    product = run.tokens * width * run.itemsize
    matrix = width * run.row
    if not run.fused:
        return 2 * product
    return max(product + matrix, run.tokens * run.row + 3 * matrix)


def _expert_matrices(run: MicroBatch) -> float:
    """Return the bytes that one of an expert's three matrices takes, over all experts of this rank."""
    model = run.model
    return (
        model.n_routed_experts // run.ep_size * model.hidden_size * model.moe_intermediate_size * run.itemsize
    )


def _reference_experts(run: MicroBatch) -> Table:
    """Return the bytes that dsv2/kernels/reference/experts.py keeps. `combine` keeps almost nothing."""
    intermediate = run.pairs * run.model.moe_intermediate_size * run.itemsize
    return {
        "experts: indices": run.pairs * INT64,
        "experts: rows": run.pairs * run.row,
        "experts: gate and up": 2 * intermediate,
        "experts: silu, product": 2 * intermediate,
        # The slots, the order of their rows, and three numbers per bag.
        "sums: indices": (2 * run.pairs + 3 * run.rows) * INT64,
        "sums: in fp32": run.pairs * run.model.hidden_size * FP32,
        "sums: weights": run.pairs * FP32,
    }


def _reference_backward(run: MicroBatch, table: Table) -> float:
    """Return the peak of the reference backward pass: `combine`, then the sums in fp32, then the experts.

    The gradients of each expert's matrices are separate until the last expert is done. They are then stacked,
    first w2's and then w13's: 3 + 1 and 2 + 2 matrices per expert.
    """
    hidden_fp32 = run.model.hidden_size * FP32
    combine = 0.0
    sums = run.pairs * hidden_fp32  # the gradients of the terms
    if run.ep_size > 1:
        combine = run.rows * hidden_fp32 + run.cast * run.rows * run.row
        sums += run.rows * (run.row + run.cast * hidden_fp32)
    # By the time the experts' gradients are stacked, the rows' gradients have replaced the rows.
    freed = sum(size for name, size in table.items() if name.startswith("sums"))
    freed += table["experts: gate and up"] + table["experts: silu, product"]
    return max(combine, sums, 4 * _expert_matrices(run) - freed)


def _reference_forward(run: MicroBatch) -> float:
    """Return the peak of the reference forward pass: the largest of four moments.

    The experts' outputs exist both separately and concatenated; their fp32 sums are being cast; `combine`
    runs; or the layer's terms are being added. At each moment the attention output is alive, and so are the
    received rows or their results. The shared experts' output is alive too, or without shared experts the
    norm's output. In bf16 the residual stream after the attention is alive. So is the stream before the
    attention, unless recomputation already keeps it.
    """
    hidden_fp32 = run.model.hidden_size * FP32
    stream = run.tokens * run.row
    rows = run.rows * run.row
    received = 0 if run.ep_size == 1 else rows
    outputs = run.pairs * run.row
    shared = run.model.n_shared_experts > 0
    sums = run.cast * (outputs + rows) + run.rows * hidden_fp32
    combine = 0.0
    if received:  # the returned rows, their fp32 copies and their sums, which are then cast
        combine = received + run.cast * (run.rows * hidden_fp32 + stream) + run.tokens * hidden_fp32
    added = stream * (3 if shared else 2)
    alive = 1 + (shared or run.cast) + run.cast * (1 if run.recompute else 2)
    return max(0 if run.cast else outputs, sums, combine, added) + received + alive * stream


def _fused_experts(run: MicroBatch) -> Table:
    """Return the bytes that dsv2/kernels/fused/experts.py or experts_cute.py keeps; `combine` keeps none."""
    slots = run.rows * run.model.num_experts_per_tok
    return {
        "experts: indices": run.pairs * INT64 + slots * INT32,
        "experts: rows": run.pairs * run.row,
        "experts: gate and up": 2 * run.pairs * run.model.moe_intermediate_size * run.itemsize,
        "experts: weights": (slots + run.kernels.keeps_pair_weights * run.pairs) * FP32,
    }


def _fused_backward(run: MicroBatch) -> float:
    """Return the peak of the fused backward pass, the larger of two moments.

    With one rank, w2's gradient first exists together with the gradients of the outputs and of the product.
    Later, the input's gradient exists together with those of both weights, the pairs and the rows.

    With several ranks the input's gradient comes first. The gradients of the outputs and of the product stay
    until w2's gradient is computed, while the rows' gradients are sent and received.

    The gradients of gate and up overwrite gate and up, except in experts_cute.py.
    """
    intermediate = run.pairs * run.model.moe_intermediate_size * run.itemsize
    matrix = _expert_matrices(run)
    pairs = run.pairs * run.row
    rows = run.rows * run.row
    if run.ep_size == 1:
        peak = max(pairs + intermediate + matrix, pairs + rows + 3 * matrix)
    else:
        peak = max(2 * pairs + intermediate + 2 * rows, pairs + intermediate + matrix + 2 * rows)
        peak = max(peak, 3 * matrix + 2 * rows)
    return peak + (0 if run.kernels.overwrites_gate_and_up else 2 * intermediate)


def _fused_forward(run: MicroBatch) -> float:
    """Return the peak of the fused forward pass.

    The product, the experts' outputs and their sums exist together. The outputs of attention and of the
    shared experts are alive too, and so are the received rows if there are several ranks.
    """
    model = run.model
    rows = run.rows * run.row * (1 if run.ep_size == 1 else 2)
    alive = run.tokens * run.row * (2 if model.n_shared_experts else 1)
    return run.pairs * (run.row + model.moe_intermediate_size * run.itemsize) + rows + alive
