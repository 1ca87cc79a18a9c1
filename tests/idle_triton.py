"""The fused kernels without a GPU, for counting bytes.

A Triton kernel only writes to tensors that were made for it: with a Triton whose kernels do nothing the
same bytes are taken, and only the values are nonsense.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from dsv2.kernels.library import KernelSet, fused_kernels
from dsv2.kernels.router import Routing
from dsv2.kernels.rows import RowMap, map_rows

FUSED = "dsv2.kernels.fused"


class Idle:
    """A kernel that does nothing when it is launched."""

    def __init__(self, function: Callable[..., None]):
        pass

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *tensors, **options: None


def _jit(function: Callable[..., None] | None = None, **options: Any) -> Any:
    """A decorator, with or without options."""
    return Idle if function is None else Idle(function)


def _mm(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    """torch.mm, whose out_dtype a CPU has not."""
    if "out_dtype" in options:
        return a.new_empty(len(a), b.shape[1], dtype=options["out_dtype"])
    return torch.matmul(a, b, **options)


def _somewhere(route: Callable[..., Routing]) -> Callable[..., Routing]:
    """`route` with experts in place of nonsense: always the same ones for as many tokens."""

    def routed(x_TD: torch.Tensor, centroids_ED: torch.Tensor, top_k: int, *limits: int) -> Routing:
        routing = route(x_TD, centroids_ED, top_k, *limits)
        scores_TE = torch.rand(len(x_TD), len(centroids_ED), generator=torch.Generator().manual_seed(0))
        routing.expert_ids_TK.copy_(scores_TE.topk(top_k, dim=1).indices)
        return routing

    return routed


def _sort_slots(key_TJ: torch.Tensor, n_keys: int, n_rows: int) -> tuple[RowMap, torch.Tensor, torch.Tensor]:
    """The sort itself, as the product that follows needs real rows."""
    keys = torch.arange(n_keys, dtype=key_TJ.dtype)
    ends = (key_TJ.flatten() <= keys.unsqueeze(1)).sum(dim=1, dtype=torch.int32)
    return map_rows(key_TJ, n_rows), torch.zeros(key_TJ.shape, dtype=torch.int32), ends


@contextmanager
def idle_triton(chunk: int) -> Iterator[KernelSet]:
    """The fused kernels on a CPU, their values nonsense; the head takes `chunk` tokens at a time."""
    triton: Any = ModuleType("triton")
    triton.language = ModuleType("triton.language")
    triton.language.constexpr = int
    triton.jit, triton.cdiv = _jit, lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    modules = {name: module for name, module in sys.modules.items() if not name.startswith(FUSED)}
    modules |= {"triton": triton, "triton.language": triton.language}
    with patch.dict(sys.modules, modules, clear=True):  # torch itself must not meet this Triton
        kernels = fused_kernels()
        attention, head, experts = (
            sys.modules[f"{FUSED}.{name}"] for name in ("attention", "head", "experts")
        )
    with (
        patch.object(attention, "sdpa_kernel", lambda backend: nullcontext()),
        patch.object(head, "HEAD_CHUNK", chunk),
        patch.object(experts, "sort_slots", _sort_slots),
        patch.object(torch, "mm", _mm),
        patch.object(torch, "addmm", lambda total, a, b, **options: total),
    ):
        yield replace(kernels, route=_somewhere(kernels.route))
