"""Bringing tokens to the ranks that hold their experts, and the experts' answers home.

Shapes: T tokens, K experts a token, D hidden_size, E experts of the layer, W ranks of the EP group,
S rows sent by this rank, R rows that are here afterwards, this rank's own among them.

A token's hidden state goes to a rank once, however many of its experts live there (with EP = D:
to at most M ranks, section 2.2.2), together with its choice and weights; what comes back is one row,
the weighted sum over that rank's experts. `plan_dispatch` settles counts and order once a layer, for
backward too. `start_dispatch` leaves the exchange under way, so that other work can run meanwhile.
With one rank nothing moves, and the layer has no branch for expert parallelism.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2.kernels.reference.rows import RowMap, map_rows
from dsv2.moe.execution import Execution, WaitClock


@dataclass(frozen=True)
class Exchange:
    """Which rows cross between the ranks of a group of several."""

    rows: RowMap  # the S rows sent, out of T x W slots: by rank, then by token
    sent: list[int]  # rows to each rank [W]
    received: list[int]  # rows from each rank [W]
    group: dist.ProcessGroup

    @property
    def rows_out(self) -> int:
        """Rows sent to other ranks."""
        return sum(self.sent) - self.sent[self.group.rank()]

    @property
    def rows_in(self) -> int:
        """Rows received from other ranks."""
        return sum(self.received) - self.received[self.group.rank()]


@dataclass(frozen=True)
class DispatchPlan:
    """Where everything goes in one layer."""

    kept_ids_TK: Tensor  # int64: the token's experts, -1 for a dropped pair
    kept_E: Tensor  # int64: this rank's pairs of each expert of the layer, without the dropped ones
    first_expert: int  # this rank's first
    rows_of_expert: Tensor  # int64 [E / W]: pairs at each expert here
    n_pairs: int  # rows at the experts here; with one rank dropped pairs too, behind all others
    exchange: Exchange | None  # None with one rank


class Arrived(NamedTuple):
    """What this rank's experts are to work on."""

    x_RD: Tensor
    expert_ids_RK: Tensor  # int64, counted from this rank's first expert; -1: not here, or dropped
    weights_RK: Tensor  # fp32


def plan_dispatch(
    expert_ids_TK: Tensor,
    keep_TK: Tensor | None,
    n_experts: int,
    group: dist.ProcessGroup | None,
    load_E: Tensor | None = None,
) -> DispatchPlan:
    """Settle where rows go. Collective; waits for the device once, with one rank never.

    `keep_TK` (bool; None: all) leaves out dropped pairs, which are not sent. Rank w of the group holds
    the w-th block of E / W experts. `load_E` are the pairs of each expert, if they are counted already.
    """
    kept_TK = expert_ids_TK if keep_TK is None else expert_ids_TK.masked_fill(~keep_TK, -1)
    if keep_TK is None and load_E is not None:
        counts_E = load_E.long()
    else:
        counts_E = torch.zeros(n_experts + 1, dtype=torch.int64, device=kept_TK.device)
        counts_E.scatter_add_(0, kept_TK.flatten() + 1, torch.ones_like(kept_TK).flatten())
        counts_E = counts_E[1:]
    if group is None or group.size() == 1:
        return DispatchPlan(kept_TK, counts_E, 0, counts_E, kept_TK.numel(), None)
    size, here = group.size(), n_experts // group.size()
    reached_TW = _ranks_reached(kept_TK, here, size)
    # To each rank: its experts' pairs and the rows that bring them.
    going_WN = torch.cat((counts_E.view(size, here), reached_TW.sum(dim=0).unsqueeze(1)), dim=1)
    coming_WN = torch.empty_like(going_WN)
    dist.all_to_all_single(coming_WN, going_WN, group=group)
    rows_of_expert = coming_WN[:, :-1].sum(dim=0)
    # All sizes cross to the host at once.
    numbers = torch.cat((going_WN[:, -1], coming_WN[:, -1], rows_of_expert.sum().unsqueeze(0))).tolist()
    sent, received, n_pairs = numbers[:size], numbers[size : 2 * size], numbers[-1]
    ranks_TW = torch.arange(size, device=kept_TK.device).where(reached_TW, size)
    exchange = Exchange(map_rows(ranks_TW, sum(sent)), sent, received, group)
    return DispatchPlan(kept_TK, counts_E, group.rank() * here, rows_of_expert, n_pairs, exchange)


def _ranks_reached(kept_TK: Tensor, experts_a_rank: int, n_ranks: int) -> Tensor:
    """bool [T, W]: does the rank hold any of the token's kept experts?"""
    ranks_TK = kept_TK.div(experts_a_rank, rounding_mode="floor")  # -1 stays -1
    reached_TW = torch.zeros(len(kept_TK), n_ranks + 1, dtype=torch.bool, device=kept_TK.device)
    return reached_TW.scatter_(1, ranks_TK + 1, True)[:, 1:]


class _Transfer:
    """One exchange of rows: at most one collective is under way, forwards or backwards."""

    def __init__(self, exchange: Exchange, clock: WaitClock, homewards: bool):
        sizes = (exchange.sent, exchange.received)
        self.sizes, self.group = sizes[::-1] if homewards else sizes, exchange.group
        self.clock = clock
        self._under_way: tuple[Any, Tensor, Tensor] | None = None  # the work, and the memory it uses

    def launch(self, x: Tensor, backwards: bool) -> None:
        give, take = self.sizes[::-1] if backwards else self.sizes
        x = x.contiguous()
        out = x.new_empty(sum(take), *x.shape[1:])
        work = dist.all_to_all_single(out, x, take, give, group=self.group, async_op=True)
        self._under_way = (work, x, out)

    def wait(self) -> Tensor:
        """The rows that have come."""
        assert self._under_way is not None
        work, _, out = self._under_way
        with self.clock.waiting(out.device):
            work.wait()
        self._under_way = None
        return out


class _Launch(torch.autograd.Function):
    """Start an exchange. The result is a token for `_Finish`, and stands for the rows in autograd's graph.

    Autograd runs `_Finish`'s backward first, which starts the way back, and this one's last: what lay
    between the two in forward overlaps with the exchange in backward as well.
    """

    @staticmethod
    def forward(ctx, x: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.launch(x, backwards=False)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, token: Tensor):
        return ctx.transfer.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.wait()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.transfer.launch(grad, backwards=True)
        return grad.new_zeros(()), None


class Pending:
    """Rows on their way to their experts."""

    def __init__(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, execution: Execution):
        self._plan, exchange = plan, plan.exchange
        if exchange is None:
            self._here = Arrived(x_TD, plan.kept_ids_TK, weights_TK)
            return
        tokens_S = exchange.rows.tokens()
        choice_SK = torch.cat((weights_TK, plan.kept_ids_TK.float()), dim=1)[tokens_S]  # ids below 2^24
        self._transfers = tuple(_Transfer(exchange, execution.clock, homewards=False) for _ in range(2))
        self._choice = _Launch.apply(choice_SK, self._transfers[0])
        rows_SD = execution.kernels.gather_rows(x_TD, exchange.rows)
        self._x = _Launch.apply(rows_SD, self._transfers[1])

    def wait(self) -> Arrived:
        if self._plan.exchange is None:
            return self._here
        choice_RK2 = _Finish.apply(self._choice, self._transfers[0])
        x_RD = _Finish.apply(self._x, self._transfers[1])
        weights_RK, ids_RK = choice_RK2.chunk(2, dim=1)
        ids_RK = ids_RK.detach().long() - self._plan.first_expert
        absent_RK = (ids_RK < 0) | (ids_RK >= len(self._plan.rows_of_expert))
        return Arrived(x_RD, ids_RK.masked_fill(absent_RK, -1), weights_RK)


def start_dispatch(x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, execution: Execution) -> Pending:
    """Send each token to the ranks of its kept experts. Collective; `wait` on the result for the rows."""
    return Pending(x_TD, weights_TK, plan, execution)


def combine(y_RD: Tensor, plan: DispatchPlan, execution: Execution) -> Tensor:
    """Bring every row's answer home and add up each token's, in fp32: [T, D] in y's dtype. Collective."""
    exchange = plan.exchange
    if exchange is None:
        return y_RD
    transfer = _Transfer(exchange, execution.clock, homewards=True)
    home_SD = _Finish.apply(_Launch.apply(y_RD, transfer), transfer)
    return execution.kernels.sum_rows(home_SD, exchange.rows, len(plan.kept_ids_TK))
