"""The ranks of the job and their groups.

W ranks are data-parallel for everything but the routed experts. Each block of `ep_size` consecutive
ranks (an EP group) shares one copy of the routed experts; ranks at the same place of their EP groups
(an expert-data group) hold the same experts.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2.config.schema import Config, Device
from dsv2.errors import UserError
from dsv2.kernels.specs import find_spec, latent_heads
from dsv2.moe.execution import WaitClock


@dataclass(frozen=True)
class Mesh:
    rank: int
    world_size: int
    device: torch.device
    ep_size: int
    ep_rank: int
    ep_group: dist.ProcessGroup | None  # None when ep_size is 1: the experts are all here
    cpu_group: dist.ProcessGroup | None  # gloo, for what lives on the host; None with one rank
    clock: WaitClock = field(default_factory=WaitClock)  # of the experts' exchanges

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gradient_norm(self, square: Tensor, expert_square: Tensor) -> Tensor:
        """fp32 []: the 2-norm of reduced gradients from the sums of their squares.

        This rank holds all but for other ranks' experts. Collective over the EP group.
        """
        if self.ep_group is not None:
            dist.all_reduce(expert_square, group=self.ep_group)
        return (square + expert_square).sqrt()


def pick_device(config: Config, processes: int) -> torch.device:
    """This process's device: one GPU a process, by torchrun's local rank; `processes` are on this machine.

    Raises:
        UserError: more processes on this machine than GPUs, or kernels that they or the packages here lack.
    """
    kernels = find_spec(config.runtime.kernels)
    gpus = torch.cuda.device_count()
    on_cpu = config.runtime.device is Device.cpu or (config.runtime.device is Device.auto and gpus == 0)
    if on_cpu:
        kernels.check_cpu()
        return torch.device("cpu")
    if gpus == 0:
        raise UserError("runtime.device=cuda: there is no GPU on this machine; use runtime=default")
    if processes > gpus:
        raise UserError(
            f"runtime.device={config.runtime.device.value}: {processes} processes on this machine, which has "
            f"{gpus} GPUs; start at most {gpus} (NPROC=N launch/local.sh, torchrun --nproc_per_node=N), or "
            "use runtime.device=cpu"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if kernels.needs_gpu:
        name = torch.cuda.get_device_name(device)
        kernels.check_gpu(name, torch.cuda.get_device_capability(device)[0], latent_heads(config.model))
        kernels.check_packages()
    return device


def init_process_group(device: torch.device, rank: int, world_size: int) -> None:
    """NCCL on GPUs, gloo on CPU. A single process needs neither torchrun nor a socket."""
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    if bound:
        torch.cuda.set_device(device)
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = torch.distributed.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=bound)
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists on it
    else:
        dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=bound)
    assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size)


def end_process_group() -> None:
    """Leave together: a rank that exits while another still talks to it makes that one abort."""
    dist.barrier()
    dist.destroy_process_group()
