"""The machines of a job: how they find one another, and which ranks each of them starts.

The launcher on HEAD holds a small store. The launchers meet there, and the ranks' process groups begin there.
The store has no password. A job on one machine keeps it on the loopback interface.
"""

import errno
import ipaddress
import re
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from dsv2.errors import UserError

LOOPBACK = "127.0.0.1"
MEETING_S = 600.0  # how long a machine waits for the others
LEAVING = timedelta(seconds=30)  # how long HEAD keeps the store for machines that have not ended
ATTEMPT = timedelta(seconds=5)  # one wait in the store; between two waits Ctrl-C is noticed


class Machines(NamedTuple):
    """The machines of the job, as this machine's user describes them."""

    count: int
    host: str = LOOPBACK  # HEAD
    port: int = 0  # of HEAD; 0: any free port
    is_head: bool | None = True  # None: HEAD's address tells
    job: str = "dsv2"


def find_machines(environment: Mapping[str, str]) -> Machines:
    """Read NNODES, HEAD, NODE_RANK and RDZV_ID; without NNODES the job is on this machine alone.

    Raises:
        UserError: one of them has a wrong value.
    """
    count = environment.get("NNODES")
    if not count:
        return Machines(1)
    head = environment.get("HEAD", "")
    rank = environment.get("NODE_RANK", "")
    if not re.fullmatch(r"[1-9][0-9]*", count):
        raise UserError(f"NNODES={count}: must be the number of machines, at least 1")
    if not re.fullmatch(r".+:[0-9]+", head):
        raise UserError(f"HEAD={head}: must be host:port, one of the machines and a free port on it")
    if not re.fullmatch(r"[0-9]*", rank):
        raise UserError(f"NODE_RANK={rank}: must be a whole number, 0 on HEAD")
    host, port = head.rsplit(":", 1)
    is_head = int(rank) == 0 if rank else None
    return Machines(int(count), host.strip("[]"), int(port), is_head, environment.get("RDZV_ID") or "dsv2")


class Meeting:
    """The job after its machines have met: `first_rank`, `world_size`, and HEAD's `host` and `port`."""

    def __init__(self, machines: Machines, processes: int):
        """Wait for all machines.

        Args:
            machines: of the job.
            processes: how many ranks this machine starts.

        Raises:
            UserError: a machine is missing after `MEETING_S`, or HEAD's port belongs to another job.
        """
        self.count = machines.count
        self.host = machines.host
        self._deadline = time.monotonic() + MEETING_S
        server = listen(machines)
        self.is_head = server is not None
        self.port = machines.port if server is None else server.getsockname()[1]
        self._store = self._open_store(machines, server)
        machine = self._store.add("launch/machines", 1) - 1
        if machine >= self.count:
            raise UserError(f"NNODES={self.count}: more machines than that have come to HEAD={self.host}")
        self._store.set(f"launch/processes/{machine}", str(processes))
        counts = [int(self._wait_for(f"launch/processes/{other}", machines)) for other in range(self.count)]
        self.first_rank = sum(counts[:machine])
        self.world_size = sum(counts)

    def _open_store(self, machines: Machines, server: socket.socket | None) -> Any:
        from torch.distributed import TCPStore  # not above: it takes seconds

        options: dict[str, Any] = {"is_master": server is not None, "wait_for_workers": False}
        if server is not None:
            options["master_listen_fd"] = server.detach()
        while True:
            try:
                store = TCPStore(self.host, self.port, timeout=ATTEMPT, **options)
                break
            except RuntimeError:  # HEAD is not up yet
                self._require_time(machines)
        job = store.compare_set("launch/job", "", machines.job).decode()
        if job != machines.job:
            raise UserError(
                f"RDZV_ID={machines.job}: the port of HEAD={self.host}:{self.port} belongs to job {job}; "
                "choose another port"
            )
        return store

    def _wait_for(self, key: str, machines: Machines) -> str:
        while True:
            try:
                self._store.wait([key], ATTEMPT)
                return self._store.get(key).decode()
            except RuntimeError:
                self._require_time(machines)

    def _require_time(self, machines: Machines) -> None:
        if time.monotonic() > self._deadline:
            raise UserError(
                f"NNODES={machines.count}: not all machines met at HEAD={machines.host}:{machines.port} "
                f"within {MEETING_S:.0f} s; start the same command on each, and open that port"
            )

    def tell_failure(self) -> None:
        """Tell the other machines that a rank of this one has failed."""
        self._quietly("set", "launch/failed", "")

    def has_failed_elsewhere(self) -> bool:
        """Return whether another machine has told a failure."""
        return self.count > 1 and bool(self._quietly("check", ["launch/failed"]))

    def leave(self) -> None:
        """Say that this machine's ranks have ended. HEAD then waits for the other machines."""
        if self._quietly("add", "launch/left", 1) == self.count:
            self._quietly("set", "launch/all_left", "")
        elif self.is_head:
            self._quietly("wait", ["launch/all_left"], LEAVING)

    def _quietly(self, call: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, call)(*arguments)
        except RuntimeError:  # HEAD has ended; the ranks notice by themselves
            return 0


def listen(machines: Machines) -> socket.socket | None:
    """Return the listening socket of the store if this machine is HEAD, else None.

    The socket listens on HEAD's address alone. If that address is unknown here (NAT), or if HEAD's name means
    the loopback interface here (as in many /etc/hosts), it listens on every interface.

    Raises:
        UserError: NODE_RANK=0 says that this machine is HEAD, but its port is taken.
    """
    if machines.is_head is False:
        return None
    try:
        address = socket.getaddrinfo(machines.host, machines.port, type=socket.SOCK_STREAM)[0]
        host = address[4][0]
        everywhere = host != machines.host and ipaddress.ip_address(host).is_loopback
        server = socket.create_server(address[4][:2], family=address[0])
    except OSError as error:
        if error.errno == errno.EADDRINUSE and machines.is_head:
            raise UserError(
                f"HEAD={machines.host}:{machines.port}: the port is taken; choose a free one"
            ) from None
        if not machines.is_head or error.errno == errno.EADDRINUSE:
            return None
        everywhere = True
    else:
        if not everywhere or machines.host == "localhost":
            return server
        server.close()
    return socket.create_server(("", machines.port))
