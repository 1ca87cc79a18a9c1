"""Rows pushed into other GPUs' memory are those of the all-to-all, to the bit, forward and backward."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.process import free_port, together

GPUS = torch.cuda.device_count()
EXPERTS, WIDTH, TOP_K = 16, 72, 3
TOKENS = (1, 37, 1000)  # of each rank; the largest number is what the buffer is made for

pytestmark = pytest.mark.gpu


def choice(rank: int, tokens: int, kind: str, generator: torch.Generator) -> Tensor:
    """Experts of each token: at random, all on the first rank, or nearly all of them dropped."""
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    if kind == "skewed":
        return torch.arange(TOP_K).expand(tokens, TOP_K)
    return ids.where(torch.rand(ids.shape, generator=generator) < 0.05, -1) if kind == "sparse" else ids


def travel(tensors: tuple[Tensor, ...], execution: Any) -> list[Tensor]:
    """What arrives, what comes home of it, and the gradients of the rows and of the weights."""
    from dsv2.moe.dispatch import start_dispatch

    x, weights, ids = tensors
    x = x.clone().requires_grad_()
    weights = weights.clone().requires_grad_()
    load = torch.zeros(EXPERTS, device=x.device)
    keep = ids >= 0
    dispatch = start_dispatch(x, weights, ids.where(keep, 0), keep, load, execution)
    here = dispatch.arrive()
    total = here.weights_XK.sum(dim=1, keepdim=True)
    y = dispatch.combine(here.x_XD * total.to(here.x_XD.dtype))
    (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return [here.x_XD, here.expert_ids_XK, here.weights_XK, here.rows_of_expert, y, x.grad, weights.grad]


def both_ways(rank: int, world_size: int, port: int, ep: int) -> list[str]:
    """The cases in which the two transports differ."""
    from dsv2.kernels.sets import load_kernels
    from dsv2.moe.execution import Execution
    from dsv2.moe.transport import SymmetricTransport
    from dsv2.parallel.plan import Dim, ParallelPlan
    from dsv2.parallel.start import end_process_group, start_mesh
    from dsv2.parallel.symmetric import SymmetricBuffer

    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cuda", rank)
    mesh = start_mesh(ParallelPlan(world=world_size, ep=ep), rank, device)
    kernels = load_kernels("fused")
    buffer = SymmetricBuffer(mesh[Dim.ep], ep * max(TOKENS), WIDTH * 2 + 2 * TOP_K * 4, device)
    usual = Execution(mesh[Dim.ep], kernels=kernels)
    pushed = Execution(mesh[Dim.ep], kernels=kernels, transport=SymmetricTransport(buffer))
    generator = torch.Generator().manual_seed(rank)
    different = []
    for turn in range(3):  # the buffer's halves take turns
        for kind in ("even", "skewed", "sparse"):
            for tokens in TOKENS:
                ids = choice(rank, tokens, kind, generator).to(device)
                x = torch.randn(tokens, WIDTH, generator=generator).to(device, torch.bfloat16)
                weights = torch.rand(tokens, TOP_K, generator=generator).to(device)
                want, got = (travel((x, weights, ids), execution) for execution in (usual, pushed))
                if not all(torch.equal(a, b) for a, b in zip(want, got, strict=True)):
                    different.append(f"{kind}, {tokens} tokens, turn {turn}")
    end_process_group()
    return different


@pytest.mark.parametrize(("world_size", "ep"), [(2, 2), (4, 2), (4, 4)])
def test_both_transports_move_the_same_rows(world_size, ep):
    if world_size > GPUS:
        pytest.skip(f"needs {world_size} GPUs")
    assert together(both_ways, world_size, free_port(), ep) == [[]] * world_size
