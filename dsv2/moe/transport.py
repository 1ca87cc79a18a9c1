"""How rows travel between the ranks of an expert-parallel group.

`CollectiveTransport` packs the rows in order of their ranks, and exchanges them with one all-to-all. It works
everywhere. `SymmetricTransport` writes each row straight into the memory of its rank (parallel/symmetric.py).
It packs nothing and needs no size on the host, but GPUs of one machine. Both move the same bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv2.kernels.base import KernelSet
from dsv2.kernels.types import RowMap
from dsv2.parallel.mesh import MeshDim
from dsv2.parallel.symmetric import SymmetricBuffer


@dataclass
class Route:
    """Says how many rows go from which rank to which, in the order of the ranks.

    Args:
        counts_WW: int64, rows from rank to rank.
        rank: this rank.
    """

    counts_WW: Tensor
    rank: int
    sent: list[int] = field(default_factory=list)  # to each rank; the host may learn this later
    received: list[int] = field(default_factory=list)  # from each rank; the host may learn this later
    _segments: Tensor | None = None

    def segments(self) -> Tensor:
        """Return int64 [2, 3, W]: the `segments` of `SymmetricBuffer.start` on the way out and home.

        A rank's rows are sorted by their other rank, whether it is the target or the source.
        """
        if self._segments is not None:
            return self._segments
        counts_WW = self.counts_WW
        by_target_WW = counts_WW.cumsum(1) - counts_WW
        by_source_WW = counts_WW.cumsum(0) - counts_WW
        me = self.rank
        out = (by_target_WW[me], counts_WW[me], by_source_WW[me])
        home = (by_source_WW[:, me], counts_WW[:, me], by_target_WW[:, me])
        self._segments = torch.stack((*out, *home)).view(2, 3, -1)
        return self._segments


Wait = Callable[[], tuple[Tensor, Tensor | None]]  # returns the rows that arrive, and the numbers beside them


class Transport(ABC):
    """One way to move rows; `start_transport` in dsv2/training/build.py chooses it."""

    needs_sizes: bool  # must the host know the route's `sent` and `received` before `start`?

    @abstractmethod
    def start(
        self, rows: Tensor, numbers: Tensor | None, route: Route, order: RowMap | None, *, home: bool
    ) -> Wait:
        """Start to move rows, and fp32 numbers beside them. Collective.

        Args:
            rows: [rows, D], or with an order [T, D].
            order: the row of each (token, rank); None: the rows are in the order of the ranks.
            home: from the experts' ranks back to the tokens' ranks.
        """


class CollectiveTransport(Transport):
    needs_sizes = True

    def __init__(self, ep: MeshDim, kernels: KernelSet):
        self._ep = ep
        self._kernels = kernels

    def start(
        self, rows: Tensor, numbers: Tensor | None, route: Route, order: RowMap | None, *, home: bool
    ) -> Wait:
        send, receive = (route.received, route.sent) if home else (route.sent, route.received)
        tensors = [rows] if numbers is None else [numbers, rows]
        if order is not None:
            order = order.first(sum(send))
            tensors = [self._kernels.copy_rows(tensor, order) for tensor in tensors]
        works = [self._ep.exchange(tensor, send=send, receive=receive) for tensor in tensors]

        def wait() -> tuple[Tensor, Tensor | None]:
            arrived = [work.wait() for work in works]
            works.clear()
            return arrived[-1], arrived[0] if len(arrived) > 1 else None

        return wait


class SymmetricTransport(Transport):
    needs_sizes = False

    def __init__(self, buffer: SymmetricBuffer):
        self._buffer = buffer

    def start(
        self, rows: Tensor, numbers: Tensor | None, route: Route, order: RowMap | None, *, home: bool
    ) -> Wait:
        numbers = None if numbers is None else numbers.contiguous()
        arriving = self._buffer.start(
            rows.contiguous(),
            numbers,
            segments=route.segments()[int(home)],
            slots=None if order is None else order.slots,
            n_slots=1 if order is None else order.n_slots,
        )
        return lambda: arriving.wait(sum(route.sent if home else route.received))
