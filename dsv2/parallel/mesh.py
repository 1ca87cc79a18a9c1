"""Every collective of the project: a `Mesh` has one `MeshDim` per dimension of the plan.

A collective returns a new tensor and never changes its argument, unless its name ends in `in_place`. With
one rank it returns the argument's values without a process group. An error in a collective is `PeerLost`:
another process has ended. plan.py says who belongs together; start.py makes the process groups. DeepSpeed's
own collectives run inside dsv2/parallel/zero, and torch's own for checkpoints in dsv2/checkpoint/store.py.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2.errors import PeerLost
from dsv2.parallel.clock import WaitClock
from dsv2.parallel.plan import Dim, ParallelPlan
from dsv2.parallel.progress import Progress

T = TypeVar("T")


def _collective(call: Callable[..., T], *args: Any, **options: Any) -> T:
    """Run one collective, or wait for it. An error in it means that another process is gone."""
    try:
        return call(*args, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _peer_lost(error) from error


@contextmanager
def peers_watched() -> Iterator[None]:
    """Turn an error of a collective into PeerLost where DeepSpeed runs its own collectives.

    gloo raises a plain RuntimeError, which could mean anything. It counts if a collective of torch raised it.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _raised_in(error) == dist.all_reduce.__module__:
            raise _peer_lost(error) from error
        raise


def _raised_in(error: BaseException) -> str | None:
    """Return the name of the module whose code raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__") if trace else None


def _peer_lost(error: RuntimeError) -> PeerLost:
    return PeerLost(f"another process has ended; its own message says why ({error})")


class Work:
    """Data on their way between ranks. Both tensors stay alive until `wait` returns."""

    def __init__(self, received: Tensor, sent: Tensor | None = None, work: dist.Work | None = None):
        self.device = received.device
        self._received = received
        self._sent = sent
        self._work = work

    def wait(self) -> Tensor:
        """Return what was received. On a GPU the stream waits, not the host."""
        if self._work is not None:
            _collective(self._work.wait)
        self._work = None
        self._sent = None
        return self._received


class MeshDim:
    """The ranks along one dimension, seen from this rank. All ranks must call a collective together.

    Args:
        group: moves tensors on the mesh's device; None with one rank.
        clock: counts the time in collectives that return only when they are done.
        host_group: a gloo group of the same ranks. `objects` and `agree` need it, and on a GPU so do host
            tensors. Only `world` and `dp` have one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        host_group: dist.ProcessGroup | None = None,
        clock: WaitClock | None = None,
    ):
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.host_group = host_group
        self._clock = clock
        self.group = group  # for libraries that need it
        self._group = group if self.size > 1 else None
        self._on_host = self.size > 1 and dist.get_backend(group) == "gloo"
        self.begun = 0  # collectives that this rank has begun

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's x, in x's dtype."""
        total = x.clone(memory_format=torch.contiguous_format)
        if self._group is not None:
            self._begin(dist.all_reduce, total, group=self._group_for(x))
        return total

    def gather(self, x: Tensor) -> Tensor:
        """Return [size, *x.shape]: every rank's x, in rank order. With one rank it is a view of x."""
        return self._gather(x, async_op=False).wait()

    def start_gather(self, x: Tensor) -> Work:
        """Start to gather every rank's x. `wait` returns [size, *x.shape], in rank order."""
        return self._gather(x, async_op=True)

    def exchange(self, x: Tensor, send: list[int], receive: list[int]) -> Work:
        """Start to send the next `send[w]` rows of x to each rank w. Rank w sends `receive[w]` rows here."""
        if self._group is None:
            return Work(x)
        x = x.contiguous()
        received = x.new_empty(sum(receive), *x.shape[1:])
        group = self._group_for(x)
        work = self._begin(dist.all_to_all_single, received, x, receive, send, group=group, async_op=True)
        return Work(received, x, work)

    def scatter_sum_in_place(self, x: Tensor) -> Work:
        """Start to sum every rank's x [size * n]. `wait` returns this rank's part [n], a view of x.

        The other parts of x are undefined until then and afterwards.
        """
        part = x.view(self.size, -1)[self.rank]
        if self._group is None:
            return Work(part)
        group = self._group_for(x)
        return Work(part, x, self._begin(dist.reduce_scatter_tensor, part, x, group=group, async_op=True))

    def gather_in_place(self, x: Tensor) -> Work:
        """Start to fill x [size * n], whose part [n] of this rank is filled, with the other ranks' parts."""
        if self._group is None:
            return Work(x)
        part = x.view(self.size, -1)[self.rank]
        group = self._group_for(x)
        return Work(x, part, self._begin(dist.all_gather_into_tensor, x, part, group=group, async_op=True))

    def objects(self, value: T) -> list[T]:
        """Return every rank's value (anything that pickles), in rank order."""
        values = [value] * self.size
        if self._group is not None:
            self._begin(dist.all_gather_object, values, value, group=self._host())
        return values

    def agree(self, flag: bool) -> bool:
        """Return whether any rank's flag is set. Every rank gets the same answer."""
        if self._group is None:
            return flag
        largest = torch.tensor(int(flag))
        self._begin(dist.all_reduce, largest, op=dist.ReduceOp.MAX, group=self._host())
        return bool(largest)

    def from_main(self, x: Tensor) -> Tensor:
        """Return the first rank's x; the others pass a tensor of the same shape and dtype."""
        answer = x.clone(memory_format=torch.contiguous_format)
        if self._group is not None:
            self._begin(dist.broadcast, answer, group=self._group_for(x), group_src=0)
        return answer

    def wait_for_all(self) -> None:
        """Return when every rank has called this."""
        if self._group is not None:
            self._begin(dist.barrier, group=self._group)

    def _gather(self, x: Tensor, async_op: bool) -> Work:
        if self._group is None:
            return Work(x[None])
        every = x.new_empty(self.size, *x.shape)
        whole = x[None].contiguous()  # gloo requires as many dimensions as the result has
        group = self._group_for(x)
        work = self._begin(dist.all_gather_into_tensor, every, whole, group=group, async_op=async_op)
        return Work(every, whole, work)

    def _begin(self, call: Callable[..., T], *args: Any, **options: Any) -> T:
        self.begun += 1
        if self._clock is None or options.get("async_op"):
            return _collective(call, *args, **options)
        with self._clock.waiting(args[0].device):
            return _collective(call, *args, **options)

    def _group_for(self, x: Tensor) -> dist.ProcessGroup | None:
        return self._group if self._on_host or x.device.type != "cpu" else self._host()

    def _host(self) -> dist.ProcessGroup:
        assert self.host_group is not None, "start.py makes one for every dimension that needs it"
        return self.host_group


class Mesh:
    """This process's device, its rank along every dimension, and the collectives of each dimension."""

    def __init__(
        self,
        device: torch.device,
        plan: ParallelPlan | None = None,
        background: MeshDim | None = None,
        clock: WaitClock | None = None,
        **dims: MeshDim,
    ):
        self.device = device
        # All ranks again, for host tensors and objects. A thread may use it while another uses `world`.
        self.background = background or ALONE
        self.plan = plan or ParallelPlan()
        self.clock = clock or WaitClock()  # of the experts' exchanges and the forward passes
        self.progress = Progress()  # of this rank
        self.hosts = [socket.gethostname()] * self.plan.world  # of each rank
        self._dims = {dim: dims.get(dim.value, ALONE) for dim in Dim}
        assert {dim: self[dim].size for dim in Dim} == self.plan.sizes

    def __getitem__(self, dim: Dim) -> MeshDim:
        return self._dims[dim]

    @property
    def is_main(self) -> bool:
        """Return whether this process prints and writes the run's files."""
        return self[Dim.world].rank == 0

    def print(self, text: str) -> None:
        """Print a line on the main rank."""
        if self.is_main:
            print(text, flush=True)

    @property
    def collectives(self) -> int:
        """Return how many collectives this rank has begun along all dimensions."""
        return sum(dim.begun for dim in set(self._dims.values()))

    def gradient_norm(self, square: Tensor, expert_square: Tensor) -> Tensor:
        """Return the 2-norm of all reduced gradients, fp32 [].

        Args:
            square: sum of squares of the dense gradients of this rank's stage.
            expert_square: sum of squares of the gradients of this rank's experts.
        """
        stage_square = square + self[Dim.ep].sum(expert_square)
        return self[Dim.pp].sum(stage_square).sqrt()


ALONE = MeshDim()  # a dimension of one rank
