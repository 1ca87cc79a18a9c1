"""Functions in processes of their own, as a process group lives once a process; sizes of a small model."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from dsv2.config.schema import Kernels
from dsv2.kernels.sets import KernelSet, fused_kernels
from dsv2.packages import CUTE, misfit

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
}  # multiples of what the fused kernels want, for `tiny_config`


# A test of both. The libraries around CuTe warn of what they do themselves.
FUSED_KERNELS = pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(Kernels.fused, id="fused"),
        pytest.param(Kernels.fused_cute, id="cute", marks=pytest.mark.filterwarnings("ignore")),
    ],
)


def need(kernels: Kernels) -> None:
    """Skip the test where `fused_cute` would be refused."""
    if kernels is Kernels.fused_cute:
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("no Hopper GPU")
        if wrong := misfit(CUTE):
            pytest.skip(wrong)


def kernel_set(kernels: Kernels) -> KernelSet:
    need(kernels)
    return fused_kernels(cute=kernels is Kernels.fused_cute)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def together(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(rank, world_size, *arguments)` on every rank at once."""
    with ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(function, rank, world_size, *arguments) for rank in range(world_size)]
        return [rank.result() for rank in ranks]
