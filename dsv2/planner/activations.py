"""Count the bytes of one micro-batch's activations: sums over the tables of the model's parts.

The tables are in the spec of the attention, in dsv2/moe/memory.py and in dsv2/model/head_memory.py.
"""

from typing import NamedTuple

from dsv2.model.attention.kinds import attention_kind
from dsv2.model.head_memory import head_peak
from dsv2.model.sizes import count_layers
from dsv2.moe.memory import dense_ffn, dense_peak, moe, moe_peak, stream_peak
from dsv2.parallel.micro_batch import MicroBatch


class Activations(NamedTuple):
    """Holds the bytes that a rank needs for one micro-batch, in addition to its model states."""

    kept: float  # what the layers keep until their backward pass
    logits: float  # what the head needs in addition to `kept`
    layers: float  # at the peak within a layer, including what other layers keep
    single: float  # at the peak within a layer, without what other layers keep

    @property
    def peak(self) -> float:
        """Return the bytes at the peak of the forward and backward pass: at the head, or within a layer."""
        return max(self.kept + self.logits, self.layers)


def activations(run: MicroBatch) -> Activations:
    """Return the bytes that the activations of all layers and of the head need."""
    attention = attention_kind(run.model)
    stream = run.tokens * run.row
    dense_layers, moe_layers = count_layers(run.model)
    attention_kept = run.norm_bytes(run.model.hidden_size) + sum(attention.kept_bytes(run).values())
    dense_kept = sum(dense_ffn(run).values())
    moe_kept = sum(moe(run).values())
    attention_peak = attention.peak_bytes(run) + run.fused * stream_peak(run)
    dense_total = dense_kept + dense_peak(run) if dense_layers else 0
    moe_total = moe_kept + moe_peak(run) if moe_layers else 0
    if run.recompute:  # each layer keeps only its input, and recomputes everything else in its backward pass
        kept = run.model.num_hidden_layers * stream
        attention_kept -= stream if run.whole_norm or not run.cast else 0  # the input is already kept
        single = attention_kept + max(moe_total, dense_total, attention_peak)
        return Activations(kept, head_peak(run), kept + single, single)
    dense_layers_kept = dense_layers * (attention_kept + dense_kept)
    kept = dense_layers_kept + moe_layers * (attention_kept + moe_kept)
    single = attention_kept + max(moe_total, dense_total, attention_peak)
    # While a layer's backward pass runs, all layers before it keep their tensors. So the peak is in the last
    # MoE layer or in the last dense layer.
    in_last_moe = kept + max(moe_peak(run), attention_peak - moe_kept) if moe_layers else 0
    in_last_dense = dense_layers_kept + dense_total - dense_kept
    return Activations(kept, head_peak(run), max(in_last_moe, in_last_dense), single)
