"""A buffer on each GPU of a group, into which the others of the group write rows directly.

torch's symmetric memory gives each rank the addresses of all buffers. It needs GPUs of one machine that are
linked, as by NVLink. A buffer has two halves, which take turns. A rank writes into a half again only after
the next exchange in the other half. Before that, every rank has passed the barrier of that exchange, and so
has copied its rows out of this half. So one barrier per exchange is enough.
"""

from typing import Any

import torch
from torch import Tensor

from dsv2.errors import UserError
from dsv2.parallel.mesh import MeshDim
from dsv2.parallel.micro_batch import ROW_ALIGNMENT
from dsv2.parallel.side_stream import SideStream

WORD = 4  # bytes


class SymmetricBuffer:
    """The buffers of the ranks of `dim`, which are on one machine, seen from this rank. Collective.

    Args:
        rows: the most rows that one exchange may bring to a rank.
        row_bytes: the most bytes of a row, with the numbers beside it.

    Raises:
        UserError: symmetric memory cannot start here.
    """

    def __init__(self, dim: MeshDim, rows: int, row_bytes: int, device: torch.device):
        import torch.distributed._symmetric_memory as symmetric_memory  # slow, and rarely needed

        self.rows = rows
        self._rank = dim.rank
        self._half = rows * (-(-row_bytes // ROW_ALIGNMENT) * ROW_ALIGNMENT // WORD)  # words
        self._turn = 0
        self._side = SideStream()
        try:
            self._memory = symmetric_memory.empty(2 * self._half, dtype=torch.int32, device=device)
            group: Any = dim.group
            self._handle: Any = symmetric_memory.rendezvous(self._memory, group)
            addresses = list(self._handle.buffer_ptrs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"parallel.expert_exchange=symmetric: symmetric memory cannot start here ({reason}); "
                "use collective"
            ) from error
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)

    def start(
        self, rows: Tensor, numbers: Tensor | None, segments: Tensor, slots: Tensor | None, n_slots: int
    ) -> "Arriving":
        """Start to push rows, and numbers beside them, to all ranks. Collective.

        Args:
            rows: [rows, D], contiguous; a row has a multiple of 4 bytes.
            numbers: fp32 [rows, n]; pushed beside the rows.
            segments: int64 [3, ranks]: each rank's first row here, its number of rows, and the first row's
                position there.
            slots: int64, each pushed row's slot, which divided by `n_slots` is its index in `rows`; None: the
                rows are in order.
        """
        from dsv2.kernels.fused.push import push

        words = rows.view(torch.int32)
        number_words = None if numbers is None else numbers.view(torch.int32)
        n_numbers = 0 if number_words is None else number_words.shape[1]
        unit = ROW_ALIGNMENT // WORD
        pitch = -(-(words.shape[1] + n_numbers) // unit) * unit
        assert pitch * self.rows <= self._half, "the rows were announced when the buffer was made"
        offset = self._turn * self._half
        self._turn = 1 - self._turn
        mark = self._side.mark(rows.device)
        with self._side.after(mark):
            push(
                self._addresses,
                segments,
                slots,
                words,
                number_words,
                offset=offset,
                pitch=pitch,
                n_slots=n_slots,
                rank=self._rank,
            )
            self._handle.barrier(channel=0)
        half = self._memory[offset : offset + self._half]
        return Arriving(self._side, half, pitch, (rows, numbers, segments, slots))


class Arriving:
    """Rows on their way into this rank's buffer. What is sent stays alive until they arrive."""

    def __init__(self, side: SideStream, half: Tensor, pitch: int, sent: tuple[Tensor | None, ...]):
        self._side = side
        self._half = half
        self._pitch = pitch
        self._sent = list(sent)

    def wait(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Return `count` rows, by sender, and the numbers beside them. The stream waits, not the host."""
        self._side.join()
        rows, numbers, *_ = self._sent
        assert rows is not None
        self._sent.clear()
        table = self._half[: count * self._pitch].view(count, self._pitch)
        row_words = rows.shape[1] * rows.element_size() // WORD
        arrived = _copy(table[:, :row_words]).view(rows.dtype)
        if numbers is None:
            return arrived, None
        beside = _copy(table[:, row_words : row_words + numbers.shape[1]])
        return arrived, beside.view(numbers.dtype)


def _copy(words: Tensor) -> Tensor:
    """Return a contiguous copy. `contiguous()` would return a single row itself, which may be overwritten."""
    return words.clone(memory_format=torch.contiguous_format)
