"""What the tests on GPUs share: functions in separate processes, a training command, sizes of a small model.

A process group lives once per process.
"""

import multiprocessing
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv2.errors import UserError
from dsv2.kernels.sets import KernelSet, load_kernels
from dsv2.kernels.specs import find_spec

ROOT = Path(__file__).parents[2]
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


def train_command(folder: Path) -> list[str]:
    """A command that trains 50 steps in bf16 on made-up texts, which it prepares in the folder."""
    text = folder / "text"
    text.mkdir()
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta", "\n"], (30, 500))
    for index, row in enumerate(words):
        (text / f"{index}.txt").write_text(" ".join(row))
    data = folder / "data"
    prepare = ["-m", "data.prepare", "files", str(text), "--out", str(data), "--vocab-size", "300"]
    subprocess.run([sys.executable, *prepare, "--val-fraction", "0.2"], cwd=ROOT, check=True)
    command = [sys.executable, "train.py", "data=local", f"data.path={data}", "runtime=gpu"]
    command += [f"runs_dir={folder}", "data.sequence_length=64", "optim.total_tokens=51200"]
    command += ["optim.lr=3e-3", "optim.warmup_steps=5", "eval.sequences=8", "logging.wandb=disabled"]
    return [*command, "runtime.micro_batch_size=16"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def together(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(rank, world_size, *arguments)` on every rank at once."""
    with ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(function, rank, world_size, *arguments) for rank in range(world_size)]
        return [rank.result() for rank in ranks]
