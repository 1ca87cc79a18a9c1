"""How the machines of a job find one another. The machines are threads here."""

import socket
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from dsv2.cli import machines
from dsv2.cli.machines import Machines, Meeting, find_machines
from dsv2.errors import UserError


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Machines(3, "node0", 29500, None, "dsv2")),
        ({"NODE_RANK": "0"}, Machines(3, "node0", 29500, True, "dsv2")),
        ({"NODE_RANK": "2", "RDZV_ID": "7"}, Machines(3, "node0", 29500, False, "7")),
        ({"HEAD": "[fd00::1]:5"}, Machines(3, "fd00::1", 5, None, "dsv2")),
    ],
)
def test_variables_of_several_machines(variables, expected):
    assert find_machines({"NNODES": "3", "HEAD": "node0:29500"} | variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "0", "HEAD": "a:1"}, "NNODES=0: must be the number of machines"),
        ({"NNODES": "2"}, "HEAD=: must be host:port"),
        ({"NNODES": "2", "HEAD": "node0"}, "HEAD=node0: must be host:port"),
        ({"NNODES": "2", "HEAD": "a:1", "NODE_RANK": "b"}, "NODE_RANK=b: must be a whole number"),
    ],
)
def test_wrong_variables_of_several_machines_are_refused(variables, message):
    with pytest.raises(UserError, match=f"^{message}"):
        find_machines(variables)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_three_machines_meet_share_out_ranks_and_learn_of_a_failure():
    port = free_port()
    job = Machines(3, "127.0.0.1", port, None)
    with ThreadPoolExecutor(3) as threads:
        met = list(threads.map(lambda processes: Meeting(job, processes), [1, 2, 4]))
        assert [m.world_size for m in met] == [7, 7, 7]
        assert sum(m.is_head for m in met) == 1
        ranks = [range(m.first_rank, m.first_rank + n) for m, n in zip(met, [1, 2, 4], strict=True)]
        assert sorted(rank for some in ranks for rank in some) == list(range(7))
        assert not any(m.has_failed_elsewhere() for m in met)
        met[1].tell_failure()
        assert all(m.has_failed_elsewhere() for m in met)
        list(threads.map(Meeting.leave, met))


def test_one_machine_listens_on_the_loopback_interface_alone():
    meeting = Meeting(Machines(1), 2)
    opened = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections()
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == meeting.port
    }
    assert opened == {"127.0.0.1"}
    assert (meeting.host, meeting.first_rank, meeting.world_size) == ("127.0.0.1", 0, 2)


def test_a_name_that_means_loopback_here_listens_for_the_other_machines(monkeypatch):
    """Many /etc/hosts say so of the machine's own name."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(machines.socket, "getaddrinfo", lambda *_, **__: found)
    server = machines.listen(Machines(2, "node0", 0, None))
    assert server is not None
    with server:
        assert server.getsockname()[0] == "0.0.0.0"


def test_another_machines_address_is_not_head():
    address = "192.0.2.1"  # reserved for documentation: nobody's
    assert machines.listen(Machines(2, address, 1, None)) is None
    assert machines.listen(Machines(2, address, free_port(), False)) is None


def test_a_taken_port_and_another_jobs_port_are_refused():
    first = Meeting(Machines(1, "127.0.0.1", free_port()), 1)
    taken = Machines(2, "127.0.0.1", first.port, is_head=True)
    with pytest.raises(UserError, match=f"^HEAD=127.0.0.1:{first.port}: the port is taken"):
        Meeting(taken, 1)
    with pytest.raises(UserError, match=f"^RDZV_ID=b: .*:{first.port} belongs to job dsv2"):
        Meeting(taken._replace(is_head=None, job="b"), 1)
    with pytest.raises(UserError, match=r"^NNODES=1: more machines than that"):
        Meeting(taken._replace(count=1, is_head=False), 1)


def test_a_missing_machine_is_told(monkeypatch):
    monkeypatch.setattr(machines, "MEETING_S", 0.0)
    monkeypatch.setattr(machines, "ATTEMPT", machines.timedelta(milliseconds=100))
    with pytest.raises(UserError, match=r"^NNODES=2: not all machines met"):
        Meeting(Machines(2, "127.0.0.1", free_port(), True), 1)
