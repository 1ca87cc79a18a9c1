"""Functions in processes of their own, as a process group lives once a process; sizes of a small model."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from dsv2.errors import UserError
from dsv2.kernels.sets import KernelSet, load_kernels
from dsv2.kernels.specs import find_spec

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
        pytest.param("fused", id="fused"),
        pytest.param("fused_cute", id="cute", marks=pytest.mark.filterwarnings("ignore")),
    ],
)


def need(kernels: str) -> None:
    """Skip the test if this GPU or the installed packages do not suit the kernel set."""
    spec = find_spec(kernels)
    try:
        spec.check_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability()[0], heads=None)
        spec.check_packages()
    except UserError as refusal:
        pytest.skip(str(refusal))


def kernel_set(kernels: str) -> KernelSet:
    need(kernels)
    return load_kernels(kernels)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def together(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(rank, world_size, *arguments)` on every rank at once."""
    with ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(function, rank, world_size, *arguments) for rank in range(world_size)]
        return [rank.result() for rank in ranks]
