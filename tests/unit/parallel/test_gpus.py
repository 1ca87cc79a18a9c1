"""GPUs by their data sheets."""

import pytest

from dsv2.parallel.gpus import GPUS, peak_flops


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peak_of_known_devices(device, peak):
    assert peak_flops(device) == peak


def test_a_gpu_has_the_peak_of_its_name():
    assert {name: gpu.peak for name, gpu in GPUS.items()} == {
        name: peak_flops(f"NVIDIA {name.upper()}") for name in GPUS
    }
