"""How a model runs: ranks, recomputation and kernels. The results do not depend on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsv2.kernels.sets import REFERENCE, KernelSet
from dsv2.moe.transport import Transport
from dsv2.parallel.clock import WaitClock
from dsv2.parallel.mesh import ALONE, MeshDim
from dsv2.parallel.side_stream import SideStream


@dataclass(frozen=True)
class Execution:
    """Settings that every layer gets. The default is one process with plain torch."""

    ep: MeshDim = ALONE  # ranks that share one copy of the routed experts
    recompute: bool = False  # recompute each layer's activations in the backward pass instead of keeping them
    kernels: KernelSet = REFERENCE
    transport: Transport | None = None  # moves rows between the ranks of `ep`; None: by all-to-all
    moe_layer: Callable[..., Any] | None = None  # the class of the MoE layers; None: MoELayer of moe/layer.py
    clock: WaitClock = field(default_factory=WaitClock)  # times the experts' exchanges
    side: SideStream = field(default_factory=SideStream)  # for what overlaps with the layers' products
