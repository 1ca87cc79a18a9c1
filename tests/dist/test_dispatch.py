"""Dispatch over several ranks: what crosses, that the plain dispatch gives the same, and what runs when."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv2.moe.traffic import bytes_per_row
from dsv2.parallel.mesh import MeshDim
from tests.dist import jobs

WIDTH, TOKENS, EXPERTS = 5, 11, 8


def _case(rank: int, top_k: int, groups: int, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens, their experts within `limit` of `groups` groups, and weights. Rank 2 is uneven:
    all its tokens want the same experts."""
    rng = np.random.default_rng(rank)
    size = EXPERTS // groups
    ids = []
    for _ in range(TOKENS + rank):
        open_groups = rng.permutation(groups)[:limit]
        ids.append(rng.permutation([g * size + e for g in open_groups for e in range(size)])[:top_k])
    if rank == 2:
        ids = [ids[0]] * len(ids)
    x = torch.from_numpy(rng.standard_normal((len(ids), WIDTH)))
    return x, torch.from_numpy(np.array(ids)), torch.from_numpy(rng.random((len(ids), top_k)))


def _matrices() -> Tensor:
    """Expert e is the matrix e, [E, D, D]; the same on every rank."""
    return torch.from_numpy(np.random.default_rng(100).standard_normal((EXPERTS, WIDTH, WIDTH)))


def exchange(
    rank: int, world_size: int, top_k: int, groups: int, limit: int, dropping: bool
) -> dict[str, Any]:
    """Dispatch, apply the experts, combine; forward and gradients."""
    from dsv2.moe.dispatch import start_dispatch
    from dsv2.moe.execution import Execution

    x, ids, weights = _case(rank, top_k, groups, limit)
    keep = torch.from_numpy(np.random.default_rng(rank + 50).random(ids.shape) < 0.7) if dropping else None
    x.requires_grad_(), weights.requires_grad_()
    matrices = _matrices().requires_grad_()
    execution = Execution(MeshDim(dist.group.WORLD))
    load = torch.bincount(ids.flatten(), minlength=EXPERTS)
    dispatch = start_dispatch(x, weights.float(), ids, keep, load, execution)
    here = dispatch.arrive()
    local = matrices.unflatten(0, (world_size, -1))[rank]
    y = torch.zeros_like(here.x_XD)
    for k in range(top_k):
        chosen = here.expert_ids_XK[:, k].long() - rank * len(local)
        is_here = (chosen >= 0) & (chosen < len(local))
        out = torch.einsum("rd,rdf->rf", here.x_XD, local[chosen.where(is_here, 0)])
        y = y + (out * here.weights_XK[:, k : k + 1]).where(is_here.unsqueeze(-1), 0.0)
    result = dispatch.combine(y)
    result.mul(torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    dist.all_reduce(matrices.grad)
    return {
        "y": result.detach().numpy(),
        "grads": [t.grad.numpy() for t in (x, weights, matrices)],
        "sent": dispatch._exchange.route.sent,
        "received": dispatch._exchange.route.received,
        "rows_out": dispatch.rows_out,
        "rows_in": dispatch.rows_in,
        "waited": execution.clock.take().wait_ms,
        "pairs": here.n_pairs,
        "keep": None if keep is None else keep.numpy(),
    }


def plain(rank: int, keep: np.ndarray | None, **sizes: int) -> tuple[Tensor, list[Tensor | None]]:
    """A copy of the token for each kept pair, all experts at hand: no exchange at all."""
    x, ids, weights = _case(rank, **sizes)
    x.requires_grad_(), weights.requires_grad_()
    matrices = _matrices().requires_grad_()
    pairs = torch.einsum("td,tkdf->tkf", x, matrices[ids]) * weights.float().unsqueeze(-1)
    if keep is not None:
        pairs = pairs * torch.from_numpy(keep).unsqueeze(-1)
    y = pairs.sum(dim=1)
    y.mul(torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), [x.grad, weights.grad, matrices.grad]


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(
    ("world_size", "top_k", "groups", "limit"),
    [(2, 3, 2, 1), (2, 4, 4, 2), (4, 4, 4, 2), (4, 6, 4, 3), (4, 3, 8, 3), (4, 1, 1, 1)],
)
def test_one_row_a_rank_gives_what_a_copy_a_pair_gives(pools, world_size, top_k, groups, limit, dropping):
    sizes = {"top_k": top_k, "groups": groups, "limit": limit}
    results = pools[world_size].run("tests.dist.test_dispatch:exchange", **sizes, dropping=dropping)
    here = EXPERTS // world_size
    expected = [plain(rank, result["keep"], **sizes) for rank, result in enumerate(results)]
    matrices_grad = sum(grads[2] for _, grads in expected)
    for rank, (result, (y, grads)) in enumerate(zip(results, expected, strict=True)):
        _, ids, _ = _case(rank, **sizes)
        kept = np.ones(ids.shape, bool) if result["keep"] is None else result["keep"]
        reached = [
            {int(e) // here for e, k in zip(row, keep, strict=True) if k}
            for row, keep in zip(ids, kept, strict=True)
        ]
        # Exactly the distinct (token, rank) pairs are sent, and no more than M a token at EP = D.
        assert result["sent"] == [sum(w in ranks for ranks in reached) for w in range(world_size)]
        assert result["rows_out"] == sum(n for w, n in enumerate(result["sent"]) if w != rank)
        assert result["rows_in"] == sum(results[w]["sent"][rank] for w in range(world_size) if w != rank)
        assert 0 < result["waited"] < 60_000
        if groups == world_size:
            assert sum(result["sent"]) <= limit * len(ids)
        assert result["received"] == [other["sent"][rank] for other in results]
        # Weights travel in fp32; all else here is fp64.
        torch.testing.assert_close(torch.from_numpy(result["y"]), y, rtol=1e-6, atol=1e-6)
        for got, want in zip(result["grads"], [*grads[:2], matrices_grad], strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-6, atol=1e-6)
    assert sum(result["pairs"] for result in results) == sum(
        ids.numel() if result["keep"] is None else int(result["keep"].sum())
        for result, ids in zip(results, (_case(r, **sizes)[1] for r in range(world_size)), strict=True)
    )


def bytes_sent(rank: int, world_size: int, recompute: bool) -> tuple[list[int], float]:
    """What a layer really gives to other ranks, forward and backward: bytes by collective; its rows_out."""
    from dsv2.model.init import init_weights
    from dsv2.moe.execution import Execution
    from dsv2.moe.layer import MoELayer

    layer = MoELayer(jobs.model_config(), Execution(MeshDim(dist.group.WORLD)))
    init_weights(layer, 0.2, seed=0)
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counted(out: Tensor, x: Tensor, take: Any = None, give: Any = None, **rest: Any) -> Any:
        give_W = give or [len(x) // world_size] * world_size
        sent.append((sum(give_W) - give_W[rank]) * x[:1].numel() * x.element_size())
        return exchange(out, x, take, give, **rest)

    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    with patch.object(dist, "all_to_all_single", counted):
        ids = torch.tensor([0, 1])
        out = checkpoint(layer, x, ids, use_reentrant=False) if recompute else layer(x, ids)
        out.y_BSD.sum().backward()
    return sent, out.routing.rows_out


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_logged_bytes_are_those_sent(pools, world_size, recompute):
    """Rows, and the choice beside them, go out and home, forward and backward; recomputed, out twice."""
    results = pools[world_size].run("tests.dist.test_dispatch:bytes_sent", recompute=recompute)
    total = 0
    for sent, _ in results:
        assert len(sent) == 3 + 2 * recompute + 3
        total += sum(sent)
    rows = sum(rows_out for _, rows_out in results)
    assert total == rows * bytes_per_row(24, 3, element_bytes=4, recompute=recompute) > 0


def order_of_issue(rank: int, world_size: int) -> list[str]:
    """What a layer starts and waits for, forward and backward, in order."""
    from dsv2.model.init import init_weights
    from dsv2.moe import dispatch
    from dsv2.moe.execution import Execution
    from dsv2.moe.layer import MoELayer

    layer = MoELayer(jobs.model_config(n_group=2, topk_group=1), Execution(MeshDim(dist.group.WORLD)))
    init_weights(layer, 0.2, seed=0)
    seen: list[str] = []
    transfer = dispatch._Exchange
    arrived = transfer.arrived
    start = dispatch.CollectiveTransport.start

    def started(self: Any, *arguments: Any, home: bool) -> Any:
        seen.append("home" if home else "out")
        return start(self, *arguments, home=home)

    def waited(self: Any) -> Any:
        seen.append("wait")
        return arrived(self)

    assert layer.shared_experts is not None
    for name, module in (("shared", layer.shared_experts), ("experts", layer.experts)):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
        module.register_full_backward_hook(lambda *_, name=name: seen.append(name))
    dispatch.CollectiveTransport.start, transfer.arrived = started, waited
    try:
        x = torch.randn(2, 6, 24, requires_grad=True)
        out = layer(x, torch.tensor([0, 1])).y_BSD
        seen.append("backward")
        out.sum().backward()
    finally:
        dispatch.CollectiveTransport.start, transfer.arrived = start, arrived
    return seen


def test_shared_experts_run_while_rows_are_under_way(pools):
    for seen in pools[2].run("tests.dist.test_dispatch:order_of_issue"):
        at = seen.index("backward")
        forward, backward = seen[:at], seen[at + 1 :]
        # The shared experts are queued before the host waits for the numbers of rows. On a GPU they run while
        # the choice and the rows leave on the side. Backward, they run while the results' gradients travel.
        assert forward == ["shared", "out", "wait", "experts", "home", "wait"]
        assert backward == ["out", "shared", "wait", "experts", "home", "wait"]
