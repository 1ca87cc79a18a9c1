"""Bytes that the last norm, the output head and its cross-entropy keep and need at their peak; no torch."""

from dsv2.kernels.specs import HEAD_CHUNK
from dsv2.parallel.micro_batch import FP32, INT64, MicroBatch, Table


def head(run: MicroBatch) -> Table:
    """Return what the head of dsv2/kernels/reference/head.py or fused/head.py and the norm before it keep."""
    vocab = run.model.vocab_size
    norm = run.norm_bytes(run.model.hidden_size)
    labels = 2 * run.tokens * INT64
    if run.fused:  # what the head needs of the norm's output is already in the gradients
        gradients = (run.tokens + vocab) * run.row
        return {"norm": norm - run.tokens * run.row, "ids and labels": labels, "gradients": gradients}
    return {"norm": norm, "ids and labels": labels, "log-probabilities": run.tokens * vocab * FP32}


def head_peak(run: MicroBatch) -> float:
    """Return the most bytes that the head needs, what it keeps included."""
    return _fused_peak(run) if run.fused else _reference_peak(run)


def _reference_peak(run: MicroBatch) -> float:
    """Return the log-probabilities and the logits' gradient, with the larger of two neighbours.

    The gradient of the log-probabilities exists before it, the matrix's gradient after it.
    """
    model = run.model
    logits = run.tokens * model.vocab_size * FP32
    matrix = model.vocab_size * model.hidden_size * run.itemsize
    product = sum(head(run).values()) + logits + max(logits, matrix)
    # The last norm as several operations: its input, 1 / rms, and five terms of its gradient.
    norm = 0 if run.whole_norm else run.tokens * (6 * model.hidden_size + 1) * FP32
    return max(product, norm)


def _fused_peak(run: MicroBatch) -> float:
    """Return the larger of the forward and the backward pass.

    Forward, the matrix's gradient exists beside one chunk's logits. With several chunks it is summed in fp32
    and cast at the end. Backward, both gradients are multiplied by the loss's.
    """
    weight = run.model.vocab_size * run.model.hidden_size
    norm = run.norm_bytes(run.model.hidden_size) + 2 * run.tokens * INT64
    stream = run.tokens * run.row
    logits = min(HEAD_CHUNK, run.tokens) * run.model.vocab_size * run.itemsize
    forward = weight * run.itemsize + logits
    if run.tokens > HEAD_CHUNK:
        forward = weight * FP32 + max(logits, weight * run.itemsize)
    gradients = (run.tokens + run.model.vocab_size) * run.row
    return norm + max(stream + run.tokens * FP32 + forward, 2 * gradients - stream)
