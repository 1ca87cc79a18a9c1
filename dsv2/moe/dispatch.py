"""Send tokens to the ranks that hold their experts, and the experts' results back.

A token's hidden state goes to a rank once, even if several of the token's experts are on that rank. The
token's expert ids and weights are sent too. With as many ranks as expert groups, a token reaches at most M
ranks (section 2.2.2). Each of these ranks returns one row: the weighted sum over its experts.

`plan_dispatch` computes counts and order once per layer. The backward pass uses them again. `start_dispatch`
returns while the rows are still being sent, so other work can run meanwhile. With one rank nothing is sent,
and the layer needs no branch for expert parallelism.
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
    """Describes which rows cross between the ranks of an expert-parallel group of at least two ranks."""

    rows: RowMap  # the rows sent: the used slots of T x W, sorted by rank, then by token
    sent: list[int]  # [W]: number of rows sent to each rank
    received: list[int]  # [W]: number of rows received from each rank
    ep: MeshDim

    @property
    def rows_out(self) -> int:
        """Return the number of rows that this rank sends to other ranks."""
        return sum(self.sent) - self.sent[self.ep.rank]

    @property
    def rows_in(self) -> int:
        """Return the number of rows that this rank receives from other ranks."""
        return sum(self.received) - self.received[self.ep.rank]


@dataclass(frozen=True)
class DispatchPlan:
    """Describes where each row of one layer goes."""

    kept_ids_TK: Tensor  # int64: the token's experts, -1 for a dropped pair
    kept_E: Tensor  # int64: pairs of this rank's tokens per expert of the layer, without the dropped pairs
    first_expert: int  # index of this rank's first expert in the layer
    rows_of_expert: Tensor  # int64 [E / W]: pairs of all tokens per expert of this rank
    n_pairs: int  # sum of rows_of_expert. With one rank the dropped pairs count too; they come last.
    exchange: Exchange | None  # None with one rank


class Arrived(NamedTuple):
    """Holds the rows that this rank's experts receive, with each row's expert ids and weights."""

    x_XD: Tensor
    expert_ids_XK: Tensor  # int64, counted from this rank's first expert; -1 if on another rank or dropped
    weights_XK: Tensor  # fp32


def plan_dispatch(
    expert_ids_TK: Tensor,
    keep_TK: Tensor | None,
    n_experts: int,
    ep: MeshDim,
    load_E: Tensor | None = None,
) -> DispatchPlan:
    """Decide which rows go to which rank. Collective. The host waits for the device once if W > 1.

    Args:
        keep_TK: bool; pairs to keep. Dropped pairs are not sent. None keeps all.
        ep: rank w holds the w-th block of E / W experts.
        load_E: the number of pairs per expert, if it is already known.
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
    # Each rank gets the number of pairs for each of its experts, then the number of rows.
    going_W_counts = torch.cat((counts_E.view(ep.size, n_local), reached_TW.sum(dim=0).unsqueeze(1)), dim=1)
    coming_W_counts = ep.swap(going_W_counts)
    rows_of_expert = coming_W_counts[:, :-1].sum(dim=0)
    # One copy to the host for all sizes, because each copy waits for the device.
    sizes = torch.cat((going_W_counts[:, -1], coming_W_counts[:, -1], rows_of_expert.sum().unsqueeze(0)))
    counts = sizes.tolist()
    sent = counts[: ep.size]
    received = counts[ep.size : -1]
    ranks_TW = torch.arange(ep.size, device=kept_TK.device).where(reached_TW, ep.size)
    return DispatchPlan(
        kept_ids_TK=kept_TK,
        kept_E=counts_E,
        first_expert=ep.rank * n_local,
        rows_of_expert=rows_of_expert,
        n_pairs=counts[-1],
        exchange=Exchange(map_rows(ranks_TW, sum(sent)), sent, received, ep),
    )


def _ranks_reached(kept_TK: Tensor, n_local: int, n_ranks: int) -> Tensor:
    """Return bool [T, W]: whether the rank holds any of the token's kept experts."""
    ranks_TK = kept_TK.div(n_local, rounding_mode="floor")  # -1 stays -1
    reached_TW = torch.zeros(len(kept_TK), n_ranks + 1, dtype=torch.bool, device=kept_TK.device)
    return reached_TW.scatter_(1, ranks_TK + 1, True)[:, 1:]


class _Transfer:
    """Exchange rows once forward and once backward. At most one of the two collectives runs at a time."""

    def __init__(self, exchange: Exchange, clock: WaitClock, returning: bool = False):
        self.ep = exchange.ep
        self.send = exchange.received if returning else exchange.sent
        self.receive = exchange.sent if returning else exchange.received
        self.clock = clock
        self._work: Work | None = None

    def launch(self, x: Tensor, backwards: bool) -> None:
        """Start to send rows. In the backward pass each row's gradient goes to the rank that sent the row."""
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
    """Start an exchange and return a handle, which represents the rows in autograd's graph until `_Finish`.

    The backward pass runs in reverse: `_Finish` starts the exchange of gradients, and `_Launch` waits for it.
    So the work between the two overlaps with the exchange in both passes.
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
    """Holds rows that are being sent to their experts."""

    def __init__(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, execution: Execution):
        self._plan = plan
        exchange = plan.exchange
        if exchange is None:
            self._arrived = Arrived(x_TD, plan.kept_ids_TK, weights_TK)
            return
        # One fp32 tensor holds the weights and the ids: fp32 represents ids below 2^24 exactly.
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
