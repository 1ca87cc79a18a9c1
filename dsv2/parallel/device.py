"""Choose this process's device, or explain why it cannot have one.

Torch is imported only if there may be a GPU, because the import takes seconds.
"""

import ctypes
import os

from dsv2.config.schema import Config, Device
from dsv2.errors import UserError
from dsv2.kernels.specs import HeadWidths, find_spec


def may_use_gpu(config: Config) -> bool:
    """Return whether torch could find a GPU here and the configuration would take it: there is a driver."""
    if config.runtime.device is Device.cpu:
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def visible_gpus(config: Config) -> int:
    """Return the number of GPUs that the configuration may use here."""
    if not may_use_gpu(config):
        return 0
    import torch

    return torch.cuda.device_count()


def pick_device(config: Config, processes: int, heads: HeadWidths | None) -> str:
    """Return this process's device, "cpu" or "cuda:N": one GPU per process, by torchrun's local rank.

    Args:
        processes: the job's processes on this machine.
        heads: the head widths that the kernels' attention must support; None if it is not used.

    Raises:
        UserError: this machine has more processes than GPUs, or its GPU or packages cannot run the kernels.
    """
    kernels = find_spec(config.runtime.kernels)
    gpus = visible_gpus(config)
    if gpus == 0 and config.runtime.device is not Device.cuda:
        kernels.check_cpu()
        return "cpu"
    if gpus == 0:
        raise UserError("runtime.device=cuda: there is no GPU on this machine; use runtime=default")
    if processes > gpus:
        raise UserError(
            f"runtime.device={config.runtime.device.value}: {processes} processes on this machine, which has "
            f"{gpus} GPUs; start at most {gpus} (NPROC=N launch/local.sh, torchrun --nproc_per_node=N), or "
            "use runtime.device=cpu"
        )
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    if kernels.needs_gpu:
        import torch

        name = torch.cuda.get_device_name(device)
        kernels.check_gpu(name, torch.cuda.get_device_capability(device)[0], heads)
        kernels.check_packages()
    return device
