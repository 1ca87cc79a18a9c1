"""Bytes of one micro-batch's activations: sums over the parts' own specs.

The tables are in the attention's spec, dsv2/moe/memory.py and dsv2/model/head_memory.py.
"""

from typing import NamedTuple

from dsv2.model.attention.kinds import attention_kind
from dsv2.model.head_memory import head_peak
from dsv2.model.sizes import count_layers
from dsv2.moe.memory import dense_ffn, dense_peak, held_orders, moe, moe_peak, stream_peak
from dsv2.parallel.micro_batch import MicroBatch


class Activations(NamedTuple):
    """Bytes a rank needs for one micro-batch beside its model states."""

    kept: float  # by the layers, until their backward pass
    logits: float  # beside `kept` at the head
    layers: float  # at the peak of a layer, what other layers keep included
    single: float  # at the peak of a layer, without what other layers keep

    @property
    def peak(self) -> float:
        """Bytes at the peak of the forward and backward pass: at the head, or in a layer."""
        return max(self.kept + self.logits, self.layers)


def activations(run: MicroBatch) -> Activations:
    """Return the activations of all layers and of the head."""
    attention = attention_kind(run.model)
    stream = run.tokens * run.row
    dense_layers, moe_layers = count_layers(run.model)
    attended = run.norm_bytes(run.model.hidden_size) + sum(attention.kept_bytes(run).values())
    dense = sum(dense_ffn(run).values())
    mixture = sum(moe(run).values())
    held = held_orders(run)
    in_attention = attention.peak_bytes(run) + run.fused * stream_peak(run)
    in_dense = dense + dense_peak(run) if dense_layers else 0
    in_mixture = mixture + moe_peak(run) if moe_layers else 0
    if run.recompute:  # a layer keeps only its input, and recomputes the rest in its backward pass
        kept = run.model.num_hidden_layers * stream + moe_layers * held
        attended -= stream if run.whole_norm or not run.cast else 0  # the input is already kept
        single = attended + max(in_mixture - held if moe_layers else 0, in_dense, in_attention)
        return Activations(kept, head_peak(run), kept + single, single)
    dense_kept = dense_layers * (attended + dense)
    kept = dense_kept + moe_layers * (attended + mixture)
    single = attended + max(in_mixture, in_dense, in_attention)
    # The peak is in the last layer, while all layers before it keep their tensors, or in the last dense one.
    in_last = kept + max(moe_peak(run), in_attention - mixture) if moe_layers else 0
    return Activations(kept, head_peak(run), max(in_last, dense_kept + in_dense - dense), single)
