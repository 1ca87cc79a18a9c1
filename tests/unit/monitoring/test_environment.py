"""What a process says about what it computes with; and nothing secret."""

import os

import pytest
import torch

from dsv2.monitoring import environment
from dsv2.monitoring.environment import machines, masked, this_process, variables, versions


def test_versions_name_what_is_installed():
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "deepspeed", "datasets", "numpy", "hydra-core", "omegaconf", "wandb"} <= set(found)
    assert None not in found.values()


SECRETS = {
    "WANDB_API_KEY": "0123456789" * 4,
    "HF_TOKEN": "hf_abcdefgh",
    "NCCL_AUTH_TOKEN": "x",
    "AWS_SECRET_ACCESS_KEY": "y",
    "HOME": "/home/me",
}


def test_only_the_variables_that_matter_are_recorded():
    kept = {
        "WORLD_SIZE": "4",
        "NNODES": "2",
        "CUDA_VISIBLE_DEVICES": "GPU-8f3e2c1a-0000-1111-2222-333344445555",
        "NCCL_DEBUG": "INFO",
        "NCCL_NET_PLUGIN": "/opt/aws-ofi-nccl/lib/libnccl-net.so",
        "WANDB_MODE": "offline",
    }
    assert variables({**kept, **SECRETS}) == dict(sorted(kept.items()))
    assert variables({"NCCL_X": f"a:{'0123456789abcdef' * 2}"}) == {"NCCL_X": "a:***"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("data.dataset=hf_abcDEF1234567890xyz", "data.dataset=***"),
        ("name=sk-proj-abc1234567890", "name=***"),
        ("data.data_files=[https://me:pass@host/a.jsonl]", "data.data_files=[https://***@host/a.jsonl]"),
        ("data=hf_stream", "data=hf_stream"),
        ("init_from=/snapshots/0123456789abcdef0123456789abcdef", None),
        ("optim.total_tokens=1_000", None),
    ],
)
def test_keys_in_the_command_are_masked(text, shown):
    assert masked(text) == (shown or text)


def test_machines_have_one_entry_per_host():
    machine = {"cpu": "c", "cores": 8, "memory_gib": 64.0}
    places = (("a", "H200", 139.8), ("a", "H200", 139.8), ("b", None, 0.0))
    ranks = [{"host": host, **machine, "gpu": gpu, "gpu_gib": gib} for host, gpu, gib in places]
    assert machines(ranks) == [
        {"host": "a", **machine, "processes": 2, "gpus": ["H200, 139.8 GiB"] * 2},
        {"host": "b", **machine, "processes": 1, "gpus": []},
    ]


def test_this_process():
    found = this_process(torch.device("cpu"))
    assert (found["host"], found["gpu"]) == (os.uname().nodename, None)
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert 0.1 < found["memory_gib"] < 1e6
    assert found["cpu"]


def test_a_driver_is_read_from_the_kernels_file(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "DRIVER", tmp_path / "version")
    assert environment._driver() is None
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  Sun Mar 30 03:42:02 UTC 2025\n"
    (tmp_path / "version").write_text(f"{line}GCC version:  gcc version 12.2.0\n")
    assert environment._driver() == "570.133.20"
