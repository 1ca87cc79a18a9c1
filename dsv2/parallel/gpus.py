"""GPUs by their data sheets."""

from dataclasses import dataclass

from dsv2.errors import UserError
from dsv2.model.sizes import peak_flops


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links, each direction on its own."""

    name: str
    memory: float  # bytes a program can have
    node_bandwidth: float  # bytes/s to the GPUs of its machine: NVLink
    network_bandwidth: float  # bytes/s to other machines: a network card a GPU, as in the makers' systems
    capability: int  # major compute capability

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        peak = peak_flops(self.name)
        assert peak is not None
        return peak


GIB, GB = 2**30, 10**9
GPUS = {
    "a100": Gpu("A100", 79 * GIB, 300 * GB, 25 * GB, 8),  # SXM, 80 GB
    "h100": Gpu("H100", 79 * GIB, 450 * GB, 50 * GB, 9),  # SXM, 80 GB
    "h800": Gpu("H800", 79 * GIB, 200 * GB, 50 * GB, 9),  # the H100 with less NVLink; the paper's
    "h200": Gpu("H200", 139 * GIB, 450 * GB, 50 * GB, 9),
    "b200": Gpu("B200", 178 * GIB, 900 * GB, 50 * GB, 10),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        UserError: none has it.
    """
    if name.lower() not in GPUS:
        raise UserError(f"gpu={name}: there is no such GPU; one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
