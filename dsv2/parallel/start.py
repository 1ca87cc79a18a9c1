"""Start and end the process group, and make the mesh's groups."""

import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dsv2.parallel.check import COLLECTIVE_TIMEOUT_S
from dsv2.parallel.clock import WaitClock
from dsv2.parallel.environment import is_on_one_machine
from dsv2.parallel.mesh import ALONE, Mesh, MeshDim
from dsv2.parallel.plan import Dim, ParallelPlan
from dsv2.parallel.zero.deepspeed_engine import expert_groups, start_deepspeed


def start_mesh(plan: ParallelPlan, rank: int, device: torch.device) -> Mesh:
    """Start the process group unless one is running, and make all groups. Collective."""
    assert plan.pp == 1, "pipeline groups will be made here once there are stages"
    # DeepSpeed still uses names of collectives that torch has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if not dist.is_initialized():
        _init_process_group(device, rank, plan.world)
    start_deepspeed()
    ep_group, edp_group = expert_groups(plan.ep)
    everyone = ALONE
    background = ALONE
    if plan.world > 1:
        everyone = MeshDim(dist.group.WORLD, _host_group())
        group = _host_group()
        background = MeshDim(group, group)
    clock = WaitClock()
    dims = {
        "world": everyone,
        "dp": everyone,
        "ep": MeshDim(ep_group, clock=clock),
        "edp": MeshDim(edp_group),
    }
    mesh = Mesh(device, plan, background, clock, **dims)
    mesh.hosts = everyone.objects(socket.gethostname())
    assert all(mesh[dim].rank == plan.coordinate(rank, dim) for dim in Dim)
    return mesh


def _host_group() -> Any:  # torch's annotation says that it may be an int
    return dist.new_group(backend="gloo")


def _init_process_group(device: torch.device, rank: int, world_size: int) -> None:
    """Start NCCL on GPUs, gloo on the CPU. A single process needs neither torchrun nor a socket."""
    on_gpu = device.type == "cuda"
    backend = "nccl" if on_gpu else "gloo"
    bound = device if on_gpu else None
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=bound)
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed requires it
    else:
        if is_on_one_machine():
            # gloo and NCCL listen on these interfaces, and ask no password.
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, "lo")
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    assert dist.get_rank() == rank
    assert dist.get_world_size() == world_size


def end_process_group() -> None:
    """Wait for all ranks, then end the group. A rank whose peer exits during communication would abort."""
    MeshDim(dist.group.WORLD).wait_for_all()
    dist.destroy_process_group()
