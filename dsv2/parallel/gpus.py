"""Data from the data sheets of GPUs: memory, peak FLOP/s, links, compute capability. Imports no torch."""

from dataclasses import dataclass

from dsv2.errors import UserError

PEAKS = {  # dense bf16 FLOP/s
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s in a GPU's data sheet, or None for an unknown GPU."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links. Each bandwidth is that of one direction."""

    name: str
    memory: float  # bytes that a program can allocate
    node_bandwidth: float  # bytes/s to the GPUs of its machine: NVLink
    network_bandwidth: float  # bytes/s to other machines: one network card per GPU, as in the makers' systems
    capability: int  # major compute capability

    @property
    def peak(self) -> float:
        """Return the dense bf16 FLOP/s."""
        return PEAKS[self.name]


GIB = 2**30
GB = 10**9
GPUS = {
    "a100": Gpu("A100", 79 * GIB, 300 * GB, 25 * GB, 8),  # SXM, 80 GB
    "h100": Gpu("H100", 79 * GIB, 450 * GB, 50 * GB, 9),  # SXM, 80 GB
    "h800": Gpu("H800", 79 * GIB, 200 * GB, 50 * GB, 9),  # an H100 with less NVLink; the paper used it
    "h200": Gpu("H200", 139 * GIB, 450 * GB, 50 * GB, 9),
    "b200": Gpu("B200", 178 * GIB, 900 * GB, 50 * GB, 10),
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name.

    Raises:
        UserError: no GPU has this name.
    """
    if name.lower() not in GPUS:
        raise UserError(f"gpu={name}: there is no such GPU; one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
