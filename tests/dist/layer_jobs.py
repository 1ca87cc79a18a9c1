"""One MoE layer on one global batch, whole or as the ranks' shares: for test_layer_invariance.py.

Shapes: B sequences, S tokens a sequence, D hidden_size, E experts, K experts a token.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from dsv2.config.schema import ModelConfig
from dsv2.parallel.mesh import ALONE, Mesh, MeshDim
from dsv2.parallel.plan import Dim, ParallelPlan
from tests.dist.traces import COUNTS, SUMS, kept_pairs
from tests.unit.helpers import report_of

BATCH = 4  # sequences
ALPHAS = (0.1, 0.2, 0.3)  # of the three balance losses


class Case(NamedTuple):
    config: ModelConfig
    x_BSD: np.ndarray
    gate_ED: np.ndarray
    ids: list[int]  # of the sequences
    order: list[int]  # the sequence that stands at each place of the batch
    recompute: bool


@dataclass
class Outcome:
    """Of a rank: its part, 0 elsewhere, so that ranks add up. Gradients are of the mean over the batch."""

    y_BSD: np.ndarray
    losses: np.ndarray  # the three balance losses, means over the batch
    grads: dict[str, np.ndarray] = field(default_factory=dict)  # of every whole parameter, and of x
    routing: dict[str, np.ndarray] = field(default_factory=dict)  # counts and sums of RoutingStats
    rows_out: float = 0.0
    kept: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)


def build_layer(case: Case, ep: MeshDim = ALONE) -> Any:
    from dsv2.model.init import init_weights
    from dsv2.moe.execution import Execution
    from dsv2.moe.layer import MoELayer

    layer = MoELayer(case.config, Execution(ep))
    init_weights(layer, 0.5, seed=0)
    layer.gate.weight.data.copy_(torch.from_numpy(case.gate_ED))
    return layer


def share(case: Case, layer: Any, rank: int, world_size: int, micro_batch: int) -> Outcome:
    """Forward and backward over the rank's micro-batches, as an engine shares a batch out."""
    x_BSD = torch.from_numpy(case.x_BSD).clone().requires_grad_()
    readout_BSD = torch.linspace(0.5, 1.5, x_BSD.numel()).view_as(x_BSD)
    together = micro_batch * world_size
    result = Outcome(np.zeros_like(case.x_BSD), np.zeros(3))
    result.routing = dict.fromkeys((*COUNTS, *SUMS), np.zeros(()))
    with kept_pairs(layer) as kept:
        for first in range(rank * micro_batch, BATCH, together):
            here = case.order[first : first + micro_batch]
            ids_B = torch.tensor([case.ids[b] for b in here])
            run = functools.partial(checkpoint, layer, use_reentrant=False) if case.recompute else layer
            out = run(x_BSD[here], ids_B)
            loss = (out.y_BSD * readout_BSD[here]).sum(dim=-1).mean()
            losses, stats = report_of(case.config, out, x_BSD.shape[1])
            loss = loss + sum(alpha * raw.sum() for alpha, raw in zip(ALPHAS, losses, strict=True))
            (loss * together / BATCH / world_size).backward()  # the mean over micro-batches and ranks
            result.y_BSD[here] = out.y_BSD.detach().numpy()
            result.losses += np.array([raw.item() for raw in losses]) * together / BATCH / world_size
            result.rows_out += out.routing.rows_out
            for name in result.routing:
                result.routing[name] = result.routing[name] + getattr(stats, name)[0].numpy()
    result.kept = kept
    result.grads = {"x": x_BSD.grad.numpy()}
    for name, parameter in layer.named_parameters():
        grad = parameter.grad.numpy()
        if name.startswith("experts."):
            whole = np.zeros((case.config.n_routed_experts, *grad.shape[1:]), np.float32)
            whole[layer.experts.first_expert : layer.experts.first_expert + len(grad)] = grad
            grad = whole
        result.grads[name] = grad
    return result


@functools.cache  # in the pool's processes, so that groups are made once
def _mesh(rank: int, world_size: int, ep: int) -> Mesh:
    from dsv2.parallel.start import start_mesh

    return start_mesh(ParallelPlan(world=world_size, ep=ep), rank, torch.device("cpu"))


def shares(rank: int, world_size: int, case: Case, layouts: list[tuple[int, int]]) -> list[Outcome]:
    """This rank's share on each layout (EP, micro-batch)."""
    dims = [_mesh(rank, world_size, ep)[Dim.ep] for ep, _ in layouts]
    return [
        share(case, build_layer(case, ep), rank, world_size, micro_batch)
        for ep, (_, micro_batch) in zip(dims, layouts, strict=True)
    ]


def together(parts: list[Outcome]) -> Outcome:
    """All ranks' parts added up."""
    whole = Outcome(sum(p.y_BSD for p in parts), sum(p.losses for p in parts))
    for group in ("grads", "routing"):
        first = getattr(parts[0], group)
        setattr(whole, group, {name: sum(getattr(p, group)[name] for p in parts) for name in first})
    whole.rows_out = sum(p.rows_out for p in parts)
    whole.kept = {place: keep for p in parts for place, keep in p.kept.items()}
    assert len(whole.kept) == sum(len(p.kept) for p in parts), "two ranks had the same sequence"
    return whole
