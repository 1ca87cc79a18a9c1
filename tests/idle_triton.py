"""The fused kernels without a GPU, for counting bytes.

A Triton kernel only writes to tensors that were made for it: with a Triton whose kernels do nothing the
same bytes are taken, and only the values are nonsense. Integers that are indices must be real, so the
kernels that write them do, with tensors that nobody counts.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

from dsv2.kernels.library import KernelSet, fused_kernels
from dsv2.kernels.router import route

FUSED = "dsv2.kernels.fused"


def _select(logits: Any, affinity: Any, ids_TK: torch.Tensor, weights: Any, *sizes: int) -> None:
    """Experts at random, within the groups' limit: always the same ones for as many tokens."""
    tokens, experts, n_group, topk_group, top_k = sizes[:5]
    scores_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    ids_TK.copy_(route(scores_TE, torch.eye(experts), top_k, n_group, topk_group).expert_ids_TK)


def _sums(affinity: Any, ids_TK: torch.Tensor, weights: Any, out_BPN: torch.Tensor, S: int, E: int, *_: int):
    """How often each expert is chosen: from these counts come the sizes of what crosses between ranks."""
    out_BPN.zero_()
    for out_PN, ids_SK in zip(out_BPN, ids_TK.split(S), strict=True):
        out_PN[0, E : 2 * E] = torch.bincount(ids_SK.flatten(), minlength=E)


def _histogram(key: torch.Tensor, count_KB: torch.Tensor, N: int, KEYS: int, _: int) -> None:
    """All keys as if of the first block."""
    count_KB.zero_()
    count_KB[:, 0] = torch.bincount(key.flatten(), minlength=KEYS)


def _place(
    key: torch.Tensor,
    count: Any,
    end: Any,
    slot_P: torch.Tensor,
    place: torch.Tensor,
    N: int,
    P: int,
    absent: int,
    *_: int,
) -> None:
    order_N = key.flatten().argsort(stable=True)
    slot_P.copy_(order_N[:P])
    place.view(-1)[order_N] = torch.arange(N, dtype=place.dtype)
    place[key == absent] = -1


WRITERS = {"_select": _select, "_sums": _sums, "_histogram": _histogram, "_place": _place}


class Idle:
    """A kernel that does nothing when it is launched, or writes indices alone."""

    def __init__(self, function: Callable[..., None]):
        self.write = WRITERS.get(function.__name__, lambda *arguments: None)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            with _disable_current_modes():
                self.write(*arguments)

        return launch


def _jit(function: Callable[..., None] | None = None, **options: Any) -> Any:
    """A decorator, with or without options."""
    return Idle if function is None else Idle(function)


def _mm(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    """torch.mm, whose out_dtype a CPU has not."""
    if "out_dtype" in options:
        return a.new_empty(len(a), b.shape[1], dtype=options["out_dtype"])
    return torch.matmul(a, b, **options)


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
        attention, head = (sys.modules[f"{FUSED}.{name}"] for name in ("attention", "head"))
    with (
        patch.object(attention, "sdpa_kernel", lambda backend: nullcontext()),
        patch.object(head, "HEAD_CHUNK", chunk),
        patch.object(torch, "mm", _mm),
        patch.object(torch, "addmm", lambda total, a, b, **options: total),
    ):
        yield kernels
