"""Which device a process takes."""

import pytest
import torch

from dsv2 import packages
from dsv2.config import Device, Kernels, ParallelConfig
from dsv2.errors import UserError
from dsv2.parallel.mesh import pick_device


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, seen by one of its processes."""

    def describe(gpus: int, local_rank: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    return describe


@pytest.mark.parametrize(
    ("gpus", "processes", "device", "expected"),
    [
        (0, 2, Device.auto, "cpu"),
        (4, 4, Device.auto, "cuda:3"),
        (4, 4, Device.cuda, "cuda:3"),
        (1, 4, Device.cpu, "cpu"),
    ],
)
def test_one_gpu_a_process_by_local_rank(machine, gpus, processes, device, expected):
    machine(gpus, local_rank=3)
    assert str(pick_device(ParallelConfig(device=device), processes)) == expected


def test_cuda_without_a_gpu(machine):
    machine(gpus=0)
    with pytest.raises(UserError) as refusal:
        pick_device(ParallelConfig(device=Device.cuda), 1)
    assert str(refusal.value) == (
        "parallel.device=cuda: there is no GPU on this machine; leave out parallel=gpu"
    )


@pytest.mark.parametrize(("gpus", "device"), [(1, Device.auto), (1, Device.cuda)])
def test_more_processes_than_gpus(machine, gpus, device):
    machine(gpus)
    with pytest.raises(UserError, match=rf"parallel.device={device.value}: 2 processes .* has {gpus} GPUs"):
        pick_device(ParallelConfig(device=device), 2)


def test_fused_kernels_want_a_gpu(machine):
    machine(gpus=0)
    with pytest.raises(UserError, match=r"parallel.kernels=fused: needs an NVIDIA GPU; on the CPU"):
        pick_device(ParallelConfig(kernels=Kernels.fused), 1)
    machine(gpus=1)
    assert str(pick_device(ParallelConfig(kernels=Kernels.fused), 1)) == "cuda:0"


CUTE = {"flash-attn-4": "4.0.0b36", "quack-kernels": "0.6.5"}


@pytest.mark.parametrize(
    ("gpus", "capability", "installed", "said"),
    [
        (0, (9, 0), CUTE, "needs an NVIDIA GPU; on the CPU use parallel.kernels=reference"),
        (1, (8, 0), CUTE, r"needs a Hopper GPU \(H100, H200\), not NVIDIA Test; use parallel.kernels=fused"),
        (1, (10, 0), {}, "needs a Hopper GPU"),
        (
            1,
            (9, 0),
            {},
            r"flash-attn-4 is not installed; .* -m pip install flash-attn-4==4.0.0b36 quack-k.*==",
        ),
        (1, (9, 0), CUTE | {"flash-attn-4": "4.0.0b35"}, "flash-attn-4 is 4.0.0b35, must be ==4.0.0b36; "),
        (
            1,
            (9, 0),
            CUTE | {"quack-kernels": "0.7"},
            "quack-kernels is 0.7, must be ==0.6.5; .* or use .*=fused$",
        ),
        (1, (9, 0), CUTE, None),
    ],
)
def test_fused_cute_wants_a_hopper_gpu_and_its_packages(
    machine, monkeypatch, gpus, capability, installed, said
):
    machine(gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(packages, "installed", installed.get)
    config = ParallelConfig(kernels=Kernels.fused_cute)
    if said is None:
        assert str(pick_device(config, 1)) == "cuda:0"
    else:
        with pytest.raises(UserError, match=f"^parallel.kernels=fused_cute: .*{said}"):
            pick_device(config, 1)
