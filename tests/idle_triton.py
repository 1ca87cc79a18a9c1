"""The fused kernels without a GPU, for counting bytes.

A Triton kernel only writes to tensors that were made for it: with a Triton whose kernels do nothing the
same bytes are taken, and only the values are nonsense. Integers that are indices must be real, so the
kernels that write them do, with tensors that nobody counts.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

from dsv2.kernels.reference.router import route
from dsv2.kernels.sets import KernelSet, load_kernels

FUSED = "dsv2.kernels.fused"


def _select(*, ids: torch.Tensor, T: int, E: int, G: int, M: int, K: int, **_: Any) -> None:
    """Experts at random, within the groups' limit: always the same ones for the same number of tokens."""
    scores_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(0))
    ids.copy_(route(scores_TE, torch.eye(E), top_k=K, n_group=G, topk_group=M).expert_ids_TK)


def _sums(*, ids: torch.Tensor, out: torch.Tensor, S: int, E: int, **_: Any) -> None:
    """How often each expert is chosen: from these counts come the sizes of what crosses between ranks."""
    out.zero_()
    for parts, ids_SK in zip(out, ids.split(S), strict=True):
        parts[0, E : 2 * E] = torch.bincount(ids_SK.flatten(), minlength=E)


def _keys(keys: torch.Tensor, first: int, absent: int) -> torch.Tensor:
    key = keys.long() - first
    return key.where((key >= 0) & (key < absent), absent)


def _histogram(
    *, keys: torch.Tensor, counts: torch.Tensor, first: int, absent: int, KEYS: int, **_: Any
) -> None:
    """All keys as if of the first block."""
    counts.zero_()
    counts[:, 0] = torch.bincount(_keys(keys, first, absent).flatten(), minlength=KEYS)


def _place(
    *,
    keys: torch.Tensor,
    slots: torch.Tensor,
    places: torch.Tensor,
    n_slots: int,
    first: int,
    absent: int,
    **_: Any,
) -> None:
    key = _keys(keys, first, absent)
    order = key.flatten().argsort(stable=True)
    slots.copy_(order[: len(slots)])
    places.view(-1)[order] = torch.arange(n_slots, dtype=places.dtype)
    places[key == absent] = -1


def _ranks(*, ids: torch.Tensor, keys: torch.Tensor, W: int, LOCAL: int, **_: Any) -> None:
    """The rank of each (token, rank) slot that has an expert of the token, W for the others."""
    ranks = ids.div(LOCAL, rounding_mode="floor")
    for w in range(W):
        keys[:, w] = torch.where((ranks == w).any(dim=1), w, W)


WRITERS = {"_select": _select, "_sums": _sums, "_histogram": _histogram, "_place": _place, "_ranks": _ranks}


class Idle:
    """A kernel that does nothing when it is launched, or only writes indices.

    As on a GPU, a launch must name the kernel's parameters: each of them, once, and no other.
    """

    def __init__(self, function: Callable[..., None]):
        self.name = function.__name__
        self.signature = inspect.signature(function)
        self.write = WRITERS.get(self.name, lambda **arguments: None)
        self.is_launched = False

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(type(size) is int for size in grid)

        def launch(*arguments: Any, num_warps: int = 4, **options: Any) -> None:
            bound = self.signature.bind(*arguments, **options)
            self.is_launched = True
            with _disable_current_modes():
                self.write(**bound.arguments)

        return launch


def _jit(function: Callable[..., None] | None = None, **options: Any) -> Any:
    """A decorator, with or without options."""
    return Idle if function is None else Idle(function)


def _mm(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    """torch.mm, whose out_dtype a CPU has not."""
    if "out_dtype" in options:
        return a.new_empty(len(a), b.shape[1], dtype=options["out_dtype"])
    return torch.matmul(a, b, **options)


def _quack() -> dict[str, Any]:
    """Its products: they make the tensors that they make on a GPU, and write nothing."""

    def gemm(a: torch.Tensor, b: torch.Tensor, out: Any = None, cu_seqlens_k: Any = None, **options: Any):
        if out is not None:
            return out
        groups = () if cu_seqlens_k is None else (len(cu_seqlens_k) - 1,)
        return a.new_empty(*groups, a.shape[-2], b.shape[-1])

    def gemm_act(a: torch.Tensor, b: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        return a.new_empty(len(a), b.shape[-1]), a.new_empty(len(a), b.shape[-1] // 2)

    def gemm_dact(a: torch.Tensor, b: torch.Tensor, preact: torch.Tensor, **options: Any):
        hidden = a.new_empty(len(a), b.shape[-1])
        return torch.empty_like(preact), hidden, a.new_empty(len(a), dtype=torch.float32)

    names = ("quack", "quack.gemm_config", "quack.gemm_interface")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules["quack.gemm_config"].GemmConfig = lambda **options: None
    modules["quack.gemm_interface"].__dict__.update(gemm=gemm, gemm_act=gemm_act, gemm_dact=gemm_dact)
    return modules


class _FlashAttention4(torch.autograd.Function):
    """The same of FlashAttention-4, which adds the queries' gradient up in fp32."""

    @staticmethod
    def forward(ctx, q_BSHQ, k_BSHQ, v_BSHV, scale):
        batch, length, heads, _ = q_BSHQ.shape
        log_sum_BHS = q_BSHQ.new_empty(batch, heads, length, dtype=torch.float32)
        out_BSHV = v_BSHV.new_empty(v_BSHV.shape)
        ctx.save_for_backward(q_BSHQ, k_BSHQ, v_BSHV, out_BSHV, log_sum_BHS)
        return out_BSHV

    @staticmethod
    def backward(ctx, grad_BSHV):
        q, k, v, _out, _log_sum = ctx.saved_tensors  # all alive to its end
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        _sum = torch.empty_like(q, dtype=torch.float32)
        return *grads, None


@contextmanager
def idle_triton(name: str, chunk: int) -> Iterator[KernelSet]:
    """Yield a fused kernel set on a CPU. Its values are nonsense; its head takes `chunk` tokens at a time."""
    triton: Any = ModuleType("triton")
    triton.language = ModuleType("triton.language")
    triton.language.constexpr = int
    triton.jit, triton.cdiv = _jit, lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    modules = {path: module for path, module in sys.modules.items() if not path.startswith(FUSED)}
    modules |= {"triton": triton, "triton.language": triton.language}
    if name == "fused_cute":
        modules |= _quack()
    with patch.dict(sys.modules, modules, clear=True):  # torch itself must not meet this Triton
        kernels = load_kernels(name)
        attention, head = (sys.modules[f"{FUSED}.{module}"] for module in ("attention", "head"))
        if name == "fused_cute":  # no spare rows, which would be more than there are
            sys.modules[f"{FUSED}.experts_cute"].__dict__["SPARE"] = 1
            attend = partial(attention._latent_attention, _FlashAttention4.apply)
            kernels = replace(kernels, latent_attention=attend)
    with (
        patch.object(attention, "sdpa_kernel", lambda backend: nullcontext()),
        patch.object(head, "HEAD_CHUNK", chunk),
        patch.object(torch, "mm", _mm),
        patch.object(torch, "addmm", lambda total, a, b, **options: total),
    ):
        yield kernels
