"""Which device a process takes."""

from typing import Any

import pytest
import torch

from dsv2 import packages
from dsv2.config.schema import Config, Device, RuntimeConfig
from dsv2.errors import UserError
from dsv2.parallel import device
from dsv2.training.start import find_device
from tests.unit.helpers import tiny_config


def job(**runtime: Any) -> Config:
    return Config(model=tiny_config(), runtime=RuntimeConfig(**runtime))


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, seen by one of its processes."""

    def describe(gpus: int, local_rank: int = 0, capability: int = 9) -> None:
        monkeypatch.setattr(device, "may_use_gpu", lambda config: config.runtime.device is not Device.cpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    return describe


@pytest.mark.parametrize(
    ("gpus", "processes", "wanted", "expected"),
    [
        (0, 2, Device.auto, "cpu"),
        (4, 4, Device.auto, "cuda:3"),
        (4, 4, Device.cuda, "cuda:3"),
        (1, 4, Device.cpu, "cpu"),
    ],
)
def test_one_gpu_a_process_by_local_rank(machine, gpus, processes, wanted, expected):
    machine(gpus, local_rank=3)
    assert find_device(job(device=wanted), processes) == expected


def test_cuda_without_a_gpu(machine):
    machine(gpus=0)
    with pytest.raises(UserError) as refusal:
        find_device(job(device=Device.cuda), 1)
    assert str(refusal.value) == ("runtime.device=cuda: there is no GPU on this machine; use runtime=default")


@pytest.mark.parametrize(("gpus", "wanted"), [(1, Device.auto), (1, Device.cuda)])
def test_more_processes_than_gpus(machine, gpus, wanted):
    machine(gpus)
    with pytest.raises(UserError, match=rf"runtime.device={wanted.value}: 2 processes .* has {gpus} GPUs"):
        find_device(job(device=wanted), 2)


def test_fused_kernels_want_a_gpu(machine):
    machine(gpus=0)
    with pytest.raises(UserError, match=r"runtime.kernels=fused: needs an NVIDIA GPU; on the CPU"):
        find_device(job(kernels="fused"), 1)
    machine(gpus=1)
    assert find_device(job(kernels="fused"), 1) == "cuda:0"


CUTE = {"flash-attn-4": "4.0.0b36", "quack-kernels": "0.6.5"}


@pytest.mark.parametrize(
    ("gpus", "capability", "installed", "said"),
    [
        (0, 9, CUTE, "needs an NVIDIA GPU; on the CPU use runtime.kernels=reference"),
        (1, 8, CUTE, r"needs a Hopper GPU \(H100, H800, H200\), not NVIDIA Test; or use fused or reference$"),
        (1, 10, {}, "needs a Hopper GPU"),
        (1, 9, {}, r"flash-attn-4 is not installed; .* -m pip install flash-attn-4==4.0.0b36 quack-k.*=="),
        (1, 9, CUTE | {"flash-attn-4": "4.0.0b35"}, "flash-attn-4 is 4.0.0b35, must be ==4.0.0b36; "),
        (1, 9, CUTE | {"quack-kernels": "0.7"}, "quack-kernels is 0.7, must be ==0.6.5; .* or use fused$"),
        (1, 9, CUTE, None),
    ],
)
def test_fused_cute_wants_a_hopper_gpu_and_its_packages(
    machine, monkeypatch, gpus, capability, installed, said
):
    machine(gpus, capability=capability)
    monkeypatch.setattr(packages, "installed", installed.get)
    config = job(kernels="fused_cute")
    if said is None:
        assert find_device(config, 1) == "cuda:0"
    else:
        with pytest.raises(UserError, match=f"^runtime.kernels=fused_cute: .*{said}"):
            find_device(config, 1)


@pytest.mark.parametrize(("capability", "width"), [(8, 192), (8, 128), (9, 192), (12, 192)])
def test_fused_wants_a_gpu_whose_cudnn_takes_the_heads(machine, capability, width):
    machine(1, capability=capability)
    config = job(kernels="fused")
    config.model.qk_nope_head_dim = width - config.model.qk_rope_head_dim
    if width <= 128 or capability == 9:
        assert find_device(config, 1) == "cuda:0"
    else:
        with pytest.raises(UserError) as refusal:
            find_device(config, 1)
        assert str(refusal.value) == (
            "runtime.kernels=fused: cuDNN's attention takes heads of at most 128 on NVIDIA Test, not 192; "
            "use reference"
        )
