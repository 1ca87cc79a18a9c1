"""Send tokens to the ranks that hold their experts, and the experts' results back.

A token's hidden state goes to a rank once, even if several of the token's experts are on that rank. The
token's expert ids and weights are sent too. With as many ranks as expert groups, a token reaches at most M
ranks (section 2.2.2). Each of these ranks returns one row: the weighted sum over its experts.

`start_dispatch` computes the order of the rows and lets the ranks exchange their numbers. `arrive` waits for
these numbers, sends the rows and returns those that arrived. Work between the two calls, such as the shared
experts, runs while the numbers and the rows travel, forward and backward. With one rank nothing is sent, and
the layer needs no branch for expert parallelism.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv2.kernels.types import RowMap
from dsv2.moe.execution import Execution
from dsv2.moe.transport import CollectiveTransport, Route, Wait
from dsv2.parallel.side_stream import HostNumbers


class Arrived(NamedTuple):
    """Holds the rows that this rank's experts receive, with each row's expert ids and weights."""

    x_XD: Tensor
    expert_ids_XK: Tensor  # in the layer, int64 or whole fp32; -1 if dropped
    weights_XK: Tensor  # fp32
    rows_of_expert: Tensor  # int64 [E / W]: pairs of all tokens per expert of this rank
    n_pairs: int  # sum of rows_of_expert. With one rank the dropped pairs count too; they come last.


class Dispatch(ABC):
    """One layer's rows on their way to their experts and back.

    Args:
        kept_E: int64, pairs of this rank's tokens per expert of the layer, without the dropped pairs.
    """

    rows_out = 0  # rows that this rank sends to other ranks; known once the rows arrive
    rows_in = 0  # rows that this rank receives from other ranks; known once the rows arrive

    def __init__(self, kept_E: Tensor):
        self.kept_E = kept_E

    @abstractmethod
    def arrive(self) -> Arrived:
        """Return the rows that arrive at this rank. Collective."""

    @abstractmethod
    def combine(self, y_XD: Tensor) -> Tensor:
        """Send the results back, and sum each token's results in fp32: [T, D] in y's dtype. Collective."""


def start_dispatch(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    keep_TK: Tensor | None,
    load_E: Tensor,
    execution: Execution,
) -> Dispatch:
    """Begin to send each token to the ranks of its kept experts. Collective.

    Args:
        keep_TK: bool; pairs to keep. Dropped pairs are not sent. None keeps all.
        load_E: the number of pairs per expert, before dropping. Rank w of `execution.ep` holds the w-th block
            of E / W experts.
    """
    if keep_TK is None:
        kept_TK = expert_ids_TK
        kept_E = load_E.long()
    else:
        kept_TK = expert_ids_TK.masked_fill(~keep_TK, -1)
        counts = torch.zeros(len(load_E) + 1, dtype=torch.int64, device=kept_TK.device)
        counts.scatter_add_(0, kept_TK.flatten() + 1, torch.ones_like(kept_TK).flatten())
        kept_E = counts[1:]
    if execution.ep.size == 1:
        return LocalDispatch(x_TD, weights_TK, kept_TK, kept_E)
    return ExchangedDispatch(x_TD, weights_TK, kept_TK, kept_E, execution)


class LocalDispatch(Dispatch):
    """One rank holds all experts."""

    def __init__(self, x_TD: Tensor, weights_TK: Tensor, kept_TK: Tensor, kept_E: Tensor):
        super().__init__(kept_E)
        self._arrived = Arrived(x_TD, kept_TK, weights_TK, kept_E, kept_TK.numel())

    def arrive(self) -> Arrived:
        return self._arrived

    def combine(self, y_XD: Tensor) -> Tensor:
        return y_XD


class ExchangedDispatch(Dispatch):
    """Several ranks share the experts.

    The rows travel in two autograd nodes, `_Leave` and `_Arrive`, and the results in `_Home` and `_Sum`. In
    the forward pass the second node of a pair waits. In the backward pass it starts the exchange, and the
    first node waits. Work between the two overlaps with the exchange:
    - forward, the shared experts with the rows;
    - backward, the shared experts with the results' gradients;
    - backward, the gradients of the experts' weights with the rows' gradients.

    The nodes hold the `_Exchange`, not this object. This object holds a node, and Python never frees a cycle
    through autograd's graph.
    """

    def __init__(
        self, x_TD: Tensor, weights_TK: Tensor, kept_TK: Tensor, kept_E: Tensor, execution: Execution
    ):
        super().__init__(kept_E)
        weights_TK = weights_TK.contiguous()
        self._exchange = _Exchange(x_TD.detach(), weights_TK.detach(), kept_TK, kept_E, execution)
        self._handle = _Leave.apply(x_TD, weights_TK, self._exchange)

    def arrive(self) -> Arrived:
        exchange = self._exchange
        n_pairs = exchange.learn_sizes()
        sent = exchange.route.sent
        received = exchange.route.received
        self.rows_out = sum(sent) - sent[exchange.route.rank]
        self.rows_in = sum(received) - received[exchange.route.rank]
        x_XD, ids_XK, weights_XK = _Arrive.apply(self._handle, exchange)
        return Arrived(x_XD, ids_XK, weights_XK, exchange.rows_of_expert, n_pairs)

    def combine(self, y_XD: Tensor) -> Tensor:
        handle = _Home.apply(y_XD, self._exchange)
        leave = self._handle.grad_fn
        if handle.requires_grad:
            # Of the nodes that are ready, the backward pass takes the one with the highest number. With the
            # number of `_Leave`, `_Home` waits only after the work that began between the two.
            handle.grad_fn._set_sequence_nr(leave._sequence_nr())
        summed = _Sum.apply(handle, self._exchange, leave)
        if handle.requires_grad:
            self._exchange.order = None  # `_Leave` has saved it
        return summed


class _Exchange:
    """What travels for one layer, and how."""

    def __init__(
        self, x_TD: Tensor, weights_TK: Tensor, kept_TK: Tensor, kept_E: Tensor, execution: Execution
    ):
        ep = execution.ep
        self._execution = execution
        self._transport = execution.transport or CollectiveTransport(ep, execution.kernels)
        self._n_tokens = len(kept_TK)
        self._device = kept_E.device
        n_local = len(kept_E) // ep.size
        order, rows_W = execution.kernels.rows_by_rank(kept_TK, n_local, ep.size)
        self.order: RowMap | None = order
        # One fp32 tensor holds the weights and the ids: fp32 represents ids below 2^24 exactly.
        choices_TK = torch.cat((weights_TK, kept_TK.to(weights_TK.dtype)), dim=1)
        # Each rank tells the number of pairs for each expert, by rank, then the number of rows.
        counts = torch.cat((kept_E.view(ep.size, n_local), rows_W.unsqueeze(1)), dim=1)
        # The side uses these tensors, so their memory stays theirs until the rows arrive.
        self._leaving: tuple[Tensor, ...] = (x_TD, choices_TK, counts)
        self._mark = execution.side.mark(self._device)
        # On a GPU only the side waits here. The layer's own wait is in `arrived`.
        waiting = nullcontext() if counts.is_cuda else execution.clock.waiting(self._device)
        with execution.side.after(self._mark):
            with waiting:
                of_all = ep.start_gather(counts).wait()
            self.route = Route(of_all[:, :, -1].contiguous(), ep.rank)
            self.rows_of_expert = of_all[:, ep.rank, :-1].sum(dim=0)
            between = self.route.counts_WW
            # One copy to the host for all sizes, because each copy waits for the device.
            sizes = (between[ep.rank], between[:, ep.rank], self.rows_of_expert.sum().unsqueeze(0))
            self._sizes: HostNumbers | None = HostNumbers(torch.cat(sizes))
            self._wait: Wait | None = None if self._transport.needs_sizes else self._send()

    def learn_sizes(self) -> int:
        """Wait for the sizes on the host, and let the rows leave. Return the number of this rank's pairs."""
        assert self._sizes is not None, "the rows arrive once"
        *rows, n_pairs = self._sizes.wait()
        self._sizes = None
        self.route.sent = rows[: len(rows) // 2]
        self.route.received = rows[len(rows) // 2 :]
        if self._transport.needs_sizes:
            with self._execution.side.after(self._mark):
                self._wait = self._send()
        return n_pairs

    def _send(self) -> Wait:
        """Start to send rows, with their ids and weights, to the ranks of their experts."""
        x_TD, choices_TK, _ = self._leaving
        return self._transport.start(x_TD, choices_TK, self.route, self.order, home=False)

    def arrived(self) -> tuple[Tensor, Tensor | None]:
        """Return what arrives of the last exchange, and count the time that it takes."""
        wait = self._wait
        assert wait is not None, "an exchange has been started"
        self._wait = None
        with self._execution.clock.waiting(self._device):
            return wait()

    def join(self, *arrived: Tensor) -> None:
        """Let the layer use what the side has made. The rows have left."""
        self._execution.side.join(*arrived, self.rows_of_expert, self.route.counts_WW)
        self._leaving = ()

    def start_out(self, rows_TD: Tensor) -> None:
        """Start to send rows of the tokens to their ranks again, in the backward pass."""
        self._wait = self._transport.start(rows_TD, None, self.route, self.order, home=False)

    def start_home(self, rows: Tensor, numbers: Tensor | None = None) -> None:
        """Start to send rows, and numbers beside them, back to the tokens' ranks."""
        self._wait = self._transport.start(rows, numbers, self.route, None, home=True)

    def sum(self, rows: Tensor) -> Tensor:
        """Sum the rows of each token, in fp32."""
        assert self.order is not None
        return self._execution.kernels.sum_rows(rows, self.order.first(len(rows)), self._n_tokens)


class _Leave(torch.autograd.Function):
    """Stands for the rows in autograd's graph until they arrive: a handle. Its node keeps their order."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weights_TK: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        assert exchange.order is not None
        ctx.save_for_backward(*exchange.order)
        return weights_TK.new_empty(())  # nobody reads a handle's value

    @staticmethod
    def backward(ctx, handle: Tensor):
        exchange = ctx.exchange
        grad_x, grad_weights = exchange.arrived()
        grads = exchange.sum(grad_x), exchange.sum(grad_weights)
        exchange.order = None
        return *grads, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, handle: Tensor, exchange: _Exchange) -> tuple[Tensor, Tensor, Tensor]:
        ctx.exchange = exchange
        x_XD, choices_XK = exchange.arrived()
        assert choices_XK is not None, "ids and weights travel beside the rows"
        exchange.join(x_XD, choices_XK)
        weights_XK, ids_XK = (half.contiguous() for half in choices_XK.chunk(2, dim=1))
        ctx.mark_non_differentiable(ids_XK)
        return x_XD, ids_XK, weights_XK

    @staticmethod
    def backward(ctx, grad_x: Tensor, _, grad_weights: Tensor):
        ctx.exchange.start_home(grad_x.contiguous(), grad_weights.contiguous())
        return grad_weights.new_empty(()), None


class _Home(torch.autograd.Function):
    """Stands for the results in autograd's graph on their way home, as `_Leave` does for the rows."""

    @staticmethod
    def forward(ctx, y_XD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start_home(y_XD.contiguous())
        return y_XD.new_empty(())

    @staticmethod
    def backward(ctx, handle: Tensor):
        grad_XD, _ = ctx.exchange.arrived()
        return grad_XD, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, handle: Tensor, exchange: _Exchange, leave: Any) -> Tensor:
        ctx.exchange = exchange
        ctx.leave = leave
        results, _ = exchange.arrived()
        return exchange.sum(results)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        exchange = ctx.exchange
        # If the layer is recomputed, this starts it: before ZeRO-3 gathers the weights of the first module.
        exchange.order = RowMap(*ctx.leave.saved_tensors)
        exchange.start_out(grad_TD.contiguous())
        return grad_TD.new_empty(()), None, None
