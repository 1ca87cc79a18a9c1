"""Choose this process's device, or explain why it cannot have one."""

import os

import torch

from dsv2.config.schema import Config, Device
from dsv2.errors import UserError
from dsv2.kernels.specs import HeadWidths, find_spec


def pick_device(config: Config, processes: int, heads: HeadWidths | None) -> torch.device:
    """Return this process's device: one GPU per process, by torchrun's local rank.

    Args:
        processes: the job's processes on this machine.
        heads: the head widths that the kernels' attention must support; None if it is not used.

    Raises:
        UserError: this machine has more processes than GPUs, or its GPU or packages cannot run the kernels.
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
        kernels.check_gpu(name, torch.cuda.get_device_capability(device)[0], heads)
        kernels.check_packages()
    return device
