"""A rank's micro-batches of one optimizer step."""

from data.streams.base import Batch, Stream
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim


def share_of_step(stream: Stream, batch_size: int, micro_batch_size: int, mesh: Mesh) -> list[Batch]:
    """Return this rank's micro-batches of the next `batch_size` global sequences.

    Consecutive sequences go to consecutive ranks. So the sequences that one EP group sees together depend
    on their number alone, not on how ranks and micro-batches make it up.
    """
    ranks = mesh[Dim.dp]
    together = micro_batch_size * ranks.size
    return [
        stream.take(together, ranks.rank * micro_batch_size, micro_batch_size)
        for _ in range(batch_size // together)
    ]
