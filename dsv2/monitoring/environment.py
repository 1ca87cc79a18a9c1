"""What a process computes with: packages, hardware, and the environment's variables that matter.

No other variable is recorded, and no value that looks like a key.
"""

import os
import platform
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2.packages import CUTE, installed

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "deepspeed",
    "triton",
    "datasets",
    "numpy",
    "hydra-core",
    "omegaconf",
    "wandb",
    "sentencepiece",
    "transformers",
    *CUTE,
)
VARIABLES = re.compile(
    r"(LOCAL_)?WORLD_SIZE|NNODES|HEAD|NPROC|MASTER_(ADDR|PORT)|OMP_NUM_THREADS|WANDB_(MODE|PROJECT)|SLURM_JOB_ID|"
    r"HF_(HUB|DATASETS)_OFFLINE|(CUDA|NCCL|GLOO|TORCH|PYTORCH|TRITON|MALLOC)_\w+"
)
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
SECRET = re.compile(r"\b(hf_|sk-|gh[a-z]_|github_pat_|xox[a-z]-|AKIA)[\w-]{16,}|(?<=://)[^/@\s]+(?=@)")
LONG_KEY = re.compile(r"[A-Za-z0-9]{32,}")
DRIVER = Path("/proc/driver/nvidia/version")


def versions() -> dict[str, str]:
    """Return the versions of what a run computes with; what is not installed is left out."""
    import torch
    from torch.cuda import nccl

    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: installed(name) for name in PACKAGES}
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, nccl.version()))
        found["driver"] = _driver()
    return {name: version for name, version in found.items() if version is not None}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that `VARIABLES` names; a value that looks like a key is masked."""
    names = [name for name in environment if VARIABLES.fullmatch(name) and not SECRET_NAME.search(name)]
    return {name: LONG_KEY.sub("***", masked(environment[name])) for name in sorted(names)}


def masked(text: str) -> str:
    """Return the text without keys of well-known services and without passwords in addresses."""
    return SECRET.sub("***", text)


def machines(processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry per machine, with the number of its processes.

    Args:
        processes: of each rank, what `this_process` returned there.
    """
    by_host: dict[str, dict[str, Any]] = {}
    for process in processes:
        of_machine = {name: value for name, value in process.items() if name not in ("gpu", "gpu_gib")}
        machine = by_host.setdefault(process["host"], {**of_machine, "processes": 0, "gpus": []})
        machine["processes"] += 1
        if process["gpu"]:
            machine["gpus"].append(f"{process['gpu']}, {process['gpu_gib']} GiB")
    return list(by_host.values())


def this_process(device: "torch.device") -> dict[str, Any]:
    """Return this process's machine, and its GPU if it has one. Memory is in GiB."""
    import psutil
    import torch

    gpu = None
    gpu_gib = 0.0
    if device.type == "cuda":
        of_gpu = torch.cuda.get_device_properties(device)
        gpu = of_gpu.name
        gpu_gib = round(of_gpu.total_memory / 2**30, 1)
    return {
        "host": socket.gethostname(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "gpu_gib": gpu_gib,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver() -> str | None:
    """Return the NVIDIA driver's version, from a line such as "NVRM version: ... Module  535.129.03  ..."."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", DRIVER.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[0] if found else None
