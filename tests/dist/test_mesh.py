"""The mesh's collectives over real processes, and what happens when one of them ends."""

from typing import Any

import pytest
import torch

from dsv2.parallel.plan import Dim, ParallelPlan
from tests.dist.pool import fork_server


def filled(rank: int, ranks: int) -> torch.Tensor:
    """Two numbers for each of some ranks; no two of them are equal on any rank."""
    return torch.arange(2.0 * ranks) + 100 * rank


def every_collective(rank: int, world_size: int, ep: int) -> dict[str, Any]:
    """Call every method of every dimension; each argument must stay as it was."""
    from dsv2.parallel.start import start_mesh

    plan = ParallelPlan(world=world_size, ep=ep)
    mesh = start_mesh(plan, rank, torch.device("cpu"))
    answers: dict[str, Any] = {"main": mesh.is_main}
    for dim in Dim:
        ranks = mesh[dim]
        members = plan.members(rank, dim)
        assert (ranks.size, members[ranks.rank]) == (len(members), rank)
        x = torch.tensor([[10.0 * rank], [1.0]], dtype=torch.float64)
        before = x.clone()
        send = [w + 1 for w in range(ranks.size)]  # w + 1 rows to rank w
        rows = torch.arange(sum(send)).unsqueeze(1) + 100 * rank
        work = ranks.exchange(rows, send=send, receive=[ranks.rank + 1] * ranks.size)
        to_all = torch.arange(ranks.size) + 10 * rank
        answers[dim] = {
            "sum": ranks.sum(x).tolist(),
            "gather": ranks.gather(x.T).tolist(),  # not contiguous
            "from_main": ranks.from_main(x).tolist(),
            "exchange": work.wait().flatten().tolist(),
            "scatter_sum": ranks.scatter_sum_in_place(filled(rank, ranks.size)).wait().tolist(),
            "gather_in_place": ranks.gather_in_place(filled(rank, ranks.size)).wait().tolist(),
            "start_gather": ranks.start_gather(to_all).wait().tolist(),
        }
        if dim in (Dim.world, Dim.dp, Dim.pp):  # the dimensions with a host group, or of one rank
            answers[dim]["objects"] = ranks.objects({"rank": rank})
            answers[dim]["agree"] = [ranks.agree(rank == 1), ranks.agree(False)]
        assert torch.equal(x, before), "a collective never changes its argument"
        assert torch.equal(to_all, torch.arange(ranks.size) + 10 * rank)
    norm = mesh.gradient_norm(torch.tensor(7.0), torch.tensor(9.0 / ep))
    answers["norm"] = norm.item()
    return answers


@pytest.mark.parametrize(("world_size", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_every_collective_of_every_dimension(pools, world_size, ep):
    plan = ParallelPlan(world=world_size, ep=ep)
    answers = pools[world_size].run("tests.dist.test_mesh:every_collective", ep=ep)
    for rank, answer in enumerate(answers):
        assert answer["main"] == (rank == 0)
        assert answer["norm"] == pytest.approx(4.0)
        for dim in Dim:
            members = plan.members(rank, dim)
            place = members.index(rank)
            first = place * (place + 1) // 2  # of the rows that each rank sends here
            got = answer[dim]
            assert got["sum"] == [[10.0 * sum(members)], [float(len(members))]]
            assert got["gather"] == [[[10.0 * member, 1.0]] for member in members]
            assert got["from_main"] == [[10.0 * members[0]], [1.0]]
            assert got["exchange"] == [100 * m + first + i for m in members for i in range(place + 1)]
            assert got["scatter_sum"] == [sum(100 * m + 2 * place + i for m in members) for i in range(2)]
            numbers = [100 * m + 2 * p + i for p, m in enumerate(members) for i in (0, 1)]
            assert got["gather_in_place"] == numbers
            assert got["start_gather"] == [[10 * m + i for i in range(len(members))] for m in members]
            if "objects" in got:
                assert got["objects"] == [{"rank": member} for member in members]
                assert got["agree"] == [1 in members, False]


def lose_a_peer(rank: int, rendezvous: str, kind: str, results: Any) -> None:
    """Rank 1 ends at once; rank 0 waits for it in a collective."""
    import torch.distributed as dist

    from dsv2.errors import PeerLost
    from dsv2.parallel.mesh import MeshDim

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    ranks = MeshDim(dist.group.WORLD, dist.group.WORLD)
    ranks.sum(torch.ones(1))
    if rank == 1:
        return
    x = torch.ones(2)
    calls = {
        "sum": lambda: ranks.sum(x),
        "exchange": lambda: ranks.exchange(x, [1, 1], [1, 1]).wait(),
        "objects": lambda: ranks.objects(x),
    }
    try:
        calls[kind]()
    except PeerLost as error:
        results.put((str(error), type(error.__cause__).__name__))


@pytest.mark.parametrize("kind", ["sum", "exchange", "objects"])
def test_a_peer_that_ended_is_lost(kind, tmp_path):
    context = fork_server()
    results = context.SimpleQueue()
    arguments = (str(tmp_path / "rendezvous"), kind, results)
    processes = [context.Process(target=lose_a_peer, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    text, cause = results.get()
    assert text.startswith("another process has ended; its own message says why (")
    assert cause in ("RuntimeError", "DistBackendError", "DistNetworkError"), cause
