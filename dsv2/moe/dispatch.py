"""Send tokens to the ranks that hold their experts, and the experts' results back.

A token's hidden state goes to a rank once, even if several of the token's experts are on that rank. Its
choice and weights travel with it. With as many ranks as expert groups it goes to at most M ranks (section
2.2.2). One row comes back per rank reached: the weighted sum over that rank's experts.

`plan_dispatch` settles counts and order once per layer, for the backward pass too. `start_dispatch` returns
while rows are on their way, so that other work can overlap. With one rank nothing moves, so the layer needs
no branch for expert parallelism.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.kernels.reference.rows import map_rows
from dsv2.kernels.types import RowMap
from dsv2.moe.execution import Execution
from dsv2.parallel.clock import WaitClock
from dsv2.parallel.mesh import MeshDim, Work


@dataclass(frozen=True)
class Exchange:
    """Which rows cross between the ranks of an expert-parallel group of several."""

    rows: RowMap  # the rows sent, out of T x W slots: by rank, then by token
    sent: list[int]  # rows to each rank [W]
    received: list[int]  # rows from each rank [W]
    ep: MeshDim

    @property
    def rows_out(self) -> int:
        """Rows sent to other ranks."""
        return sum(self.sent) - self.sent[self.ep.rank]

    @property
    def rows_in(self) -> int:
        """Rows received from other ranks."""
        return sum(self.received) - self.received[self.ep.rank]


@dataclass(frozen=True)
class DispatchPlan:
    """Where every row goes in one layer."""

    kept_ids_TK: Tensor  # int64: the token's experts, -1 for a dropped pair
    kept_E: Tensor  # int64: pairs of this rank's tokens per expert of the layer, without the dropped pairs
    first_expert: int  # index of this rank's first expert in the layer
    rows_of_expert: Tensor  # int64 [E / W]: pairs of all tokens per expert of this rank
    n_pairs: int  # sum of rows_of_expert; with one rank plus the dropped pairs, which come last
    exchange: Exchange | None  # None with one rank


class Arrived(NamedTuple):
    """The input of this rank's experts."""

    x_XD: Tensor
    expert_ids_XK: Tensor  # int64, counted from this rank's first expert; -1: on another rank, or dropped
    weights_XK: Tensor  # fp32


def plan_dispatch(
    expert_ids_TK: Tensor,
    keep_TK: Tensor | None,
    n_experts: int,
    ep: MeshDim,
    load_E: Tensor | None = None,
) -> DispatchPlan:
    """Settle where rows go. Collective. The host waits for the device once, or never with one rank.

    Args:
        keep_TK: bool; pairs to keep. Dropped pairs are not sent. None keeps all.
        ep: rank w holds the w-th block of E / W experts.
        load_E: pairs per expert, if they are already counted.
    """
    kept_TK = expert_ids_TK if keep_TK is None else expert_ids_TK.masked_fill(~keep_TK, -1)
    if keep_TK is None and load_E is not None:
        counts_E = load_E.long()
    else:
        counts_E = torch.zeros(n_experts + 1, dtype=torch.int64, device=kept_TK.device)
        counts_E.scatter_add_(0, kept_TK.flatten() + 1, torch.ones_like(kept_TK).flatten())
        counts_E = counts_E[1:]
    if ep.size == 1:
        return DispatchPlan(
            kept_ids_TK=kept_TK,
            kept_E=counts_E,
            first_expert=0,
            rows_of_expert=counts_E,
            n_pairs=kept_TK.numel(),
            exchange=None,
        )
    n_local = n_experts // ep.size
    reached_TW = _ranks_reached(kept_TK, n_local, ep.size)
    # What goes to each rank: pairs per expert of that rank, then the number of rows.
    going_W_counts = torch.cat((counts_E.view(ep.size, n_local), reached_TW.sum(dim=0).unsqueeze(1)), dim=1)
    coming_W_counts = ep.swap(going_W_counts)
    rows_of_expert = coming_W_counts[:, :-1].sum(dim=0)
    # One copy to the host for all sizes, because each copy waits for the device.
    sizes = torch.cat((going_W_counts[:, -1], coming_W_counts[:, -1], rows_of_expert.sum().unsqueeze(0)))
    numbers = sizes.tolist()
    sent = numbers[: ep.size]
    ranks_TW = torch.arange(ep.size, device=kept_TK.device).where(reached_TW, ep.size)
    return DispatchPlan(
        kept_ids_TK=kept_TK,
        kept_E=counts_E,
        first_expert=ep.rank * n_local,
        rows_of_expert=rows_of_expert,
        n_pairs=numbers[-1],
        exchange=Exchange(map_rows(ranks_TW, sum(sent)), sent, numbers[ep.size : -1], ep),
    )


def _ranks_reached(kept_TK: Tensor, n_local: int, n_ranks: int) -> Tensor:
    """Return bool [T, W]: does the rank hold any of the token's kept experts?"""
    ranks_TK = kept_TK.div(n_local, rounding_mode="floor")  # -1 stays -1
    reached_TW = torch.zeros(len(kept_TK), n_ranks + 1, dtype=torch.bool, device=kept_TK.device)
    return reached_TW.scatter_(1, ranks_TK + 1, True)[:, 1:]


class _Transfer:
    """One exchange of rows. At most one collective is running, forward or backward."""

    def __init__(self, exchange: Exchange, clock: WaitClock, returning: bool = False):
        self.ep = exchange.ep
        self.send = exchange.received if returning else exchange.sent
        self.receive = exchange.sent if returning else exchange.received
        self.clock = clock
        self._work: Work | None = None

    def launch(self, x: Tensor, backwards: bool) -> None:
        """Start to send rows. In the backward pass they return to where the forward pass sent them from."""
        if backwards:
            self._work = self.ep.exchange(x, send=self.receive, receive=self.send)
        else:
            self._work = self.ep.exchange(x, send=self.send, receive=self.receive)

    def wait(self) -> Tensor:
        """Return the received rows."""
        assert self._work is not None
        with self.clock.waiting(self._work.device):
            rows = self._work.wait()
        self._work = None
        return rows


class _Launch(torch.autograd.Function):
    """Start an exchange. Return an empty handle for `_Finish`, which stands for the rows in autograd's graph.

    In the backward pass autograd runs `_Finish` first, which starts the exchange, and `_Launch` last, which
    waits for it. Work between the two in the forward pass therefore overlaps in the backward pass as well.
    """

    @staticmethod
    def forward(ctx, x: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.launch(x, backwards=False)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, handle: Tensor):
        return ctx.transfer.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, handle: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.wait()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.transfer.launch(grad, backwards=True)
        return grad.new_zeros(()), None


class Pending:
    """Rows on their way to their experts."""

    def __init__(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, execution: Execution):
        self._plan = plan
        exchange = plan.exchange
        if exchange is None:
            self._arrived = Arrived(x_TD, plan.kept_ids_TK, weights_TK)
            return
        # One fp32 tensor holds both: fp32 represents ids below 2^24 exactly.
        choices = torch.cat((weights_TK, plan.kept_ids_TK.float()), dim=1)
        self._choice_transfer = _Transfer(exchange, execution.clock)
        self._row_transfer = _Transfer(exchange, execution.clock)
        self._choice = _Launch.apply(choices[exchange.rows.tokens()], self._choice_transfer)
        self._rows = _Launch.apply(execution.kernels.gather_rows(x_TD, exchange.rows), self._row_transfer)

    def wait(self) -> Arrived:
        """Return the rows that arrived at this rank."""
        if self._plan.exchange is None:
            return self._arrived
        choices = _Finish.apply(self._choice, self._choice_transfer)
        x_XD = _Finish.apply(self._rows, self._row_transfer)
        weights_XK, ids_XK = choices.chunk(2, dim=1)
        ids_XK = ids_XK.detach().long() - self._plan.first_expert
        absent_XK = (ids_XK < 0) | (ids_XK >= len(self._plan.rows_of_expert))
        return Arrived(x_XD, ids_XK.masked_fill(absent_XK, -1), weights_XK)


def start_dispatch(x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, execution: Execution) -> Pending:
    """Send each token to the ranks of its kept experts. Collective; `wait` on the result returns the rows."""
    return Pending(x_TD, weights_TK, plan, execution)


def combine(y_XD: Tensor, plan: DispatchPlan, execution: Execution) -> Tensor:
    """Send the results back, and sum each token's results in fp32: [T, D] in y's dtype. Collective."""
    exchange = plan.exchange
    if exchange is None:
        return y_XD
    transfer = _Transfer(exchange, execution.clock, returning=True)
    results = _Finish.apply(_Launch.apply(y_XD, transfer), transfer)
    return execution.kernels.sum_rows(results, exchange.rows, len(plan.kept_ids_TK))
