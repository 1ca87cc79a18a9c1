"""A rank's micro-batches of one optimizer step."""

from data.streams.base import Batch, Stream
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim


def share_of_step(stream: Stream, batch_size: int, micro_batch_size: int, mesh: Mesh) -> list[Batch]:
    """Return this rank's micro-batches of the next `batch_size` global sequences.

    Consecutive sequences go to consecutive ranks. Which sequences an EP group processes together therefore
    depends only on their number, not on the split into ranks and micro-batches.
    """
    ranks = mesh[Dim.dp]
    sequences_at_once = micro_batch_size * ranks.size
    return [
        stream.take(sequences_at_once, ranks.rank * micro_batch_size, micro_batch_size)
        for _ in range(batch_size // sequences_at_once)
    ]
