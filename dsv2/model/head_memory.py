"""Bytes that the last norm, the output head and the cross-entropy keep and need at their peak. No torch."""

from dsv2.kernels.specs import HEAD_CHUNK
from dsv2.parallel.micro_batch import FP32, INT64, MicroBatch, Table


def head(run: MicroBatch) -> Table:
    """Return the bytes of each tensor that the last norm and the head keep.

    The head is that of dsv2/kernels/reference/head.py or of dsv2/kernels/fused/head.py.
    """
    vocab = run.model.vocab_size
    norm = run.norm_bytes(run.model.hidden_size)
    labels = 2 * run.tokens * INT64
    if run.fused:  # the forward pass computes the gradients too, so the head does not keep the norm's output
        gradients = (run.tokens + vocab) * run.row
        return {"norm": norm - run.tokens * run.row, "ids and labels": labels, "gradients": gradients}
    return {"norm": norm, "ids and labels": labels, "log-probabilities": run.tokens * vocab * FP32}


def head_peak(run: MicroBatch) -> float:
    """Return the largest number of bytes that the head needs, including what it keeps."""
    return _fused_peak(run) if run.fused else _reference_peak(run)


def _reference_peak(run: MicroBatch) -> float:
    """Return the peak of the reference head: in the cross-entropy's backward pass, or in the norm's.

    The log-probabilities and the logits' gradient exist together. The log-probabilities' gradient exists with
    them first; later the output matrix's gradient does.
    """
    model = run.model
    logits = run.tokens * model.vocab_size * FP32
    matrix = model.vocab_size * model.hidden_size * run.itemsize
    cross_entropy = sum(head(run).values()) + logits + max(logits, matrix)
    # A norm composed of several operations needs its input, 1 / rms, and five terms of its gradient.
    norm = 0 if run.whole_norm else run.tokens * (6 * model.hidden_size + 1) * FP32
    return max(cross_entropy, norm)


def _fused_peak(run: MicroBatch) -> float:
    """Return the peak of the fused head: in the forward or in the backward pass.

    In the forward pass the matrix's gradient exists together with the logits of one chunk. If there are
    several chunks, this gradient is summed in fp32 and cast at the end. In the backward pass the gradients of
    the matrix and of the hidden states are multiplied by the loss's gradient.
    """
    elements = run.model.vocab_size * run.model.hidden_size  # of the matrix
    norm_and_labels = run.norm_bytes(run.model.hidden_size) + 2 * run.tokens * INT64
    stream = run.tokens * run.row
    logits = min(HEAD_CHUNK, run.tokens) * run.model.vocab_size * run.itemsize
    forward = elements * run.itemsize + logits
    if run.tokens > HEAD_CHUNK:
        forward = elements * FP32 + max(logits, elements * run.itemsize)
    gradients = (run.tokens + run.model.vocab_size) * run.row
    return norm_and_labels + max(stream + run.tokens * FP32 + forward, 2 * gradients - stream)
