"""What a rank really holds: run by the pool's processes for test_plan_memory.py."""

import contextlib
import gc
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from dsv2.config.schema import RuntimeConfig
from dsv2.parallel.plan import ParallelPlan
from dsv2.parallel.start import start_mesh
from dsv2.training.build import build_model
from tests.dist import jobs
from tests.idle_triton import idle_triton
from tests.live import LiveMemory

TIMES = 3  # gloo's threads may let go of what they sent a little late: the least of several times counts


def in_place(part: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
    """The reduce-scatter in place, as NCCL does it: gloo's own would copy x. `part` is a view of x."""
    return dist.all_reduce(x, **options)


def measure(rank: int, world_size: int, micro_batches: int, **layout: Any) -> tuple[int, int, int]:
    """(bytes held after some steps, most bytes during one that is not the first, bytes of a save)."""
    batch = jobs.cut(jobs.global_batch(0), 0, layout["micro_batch"])
    gc.collect()  # engines of earlier jobs are cycles
    with LiveMemory() as live, patch.object(dist, "reduce_scatter_tensor", in_place):
        engine = jobs.make_engine(rank, world_size, **layout)
        peaks = []
        for _ in range(1 + TIMES):
            gc.collect()
            live.peak = live.total
            engine.train_step([batch] * micro_batches, lr=1e-3)
            peaks.append(live.peak)
        gc.collect()
        return live.total, min(peaks[1:]), sum(engine.sharded.shard_bytes())


def one_pass(
    rank: int, world_size: int, sizes: dict[str, int], sequences: int, runtime: RuntimeConfig
) -> tuple[int, int]:
    """(bytes a forward keeps for its backward, most bytes during both), without weights and gradients."""
    with contextlib.ExitStack() as stack:
        if runtime.kernels != "reference":
            kernels = stack.enter_context(idle_triton(runtime.kernels, chunk=8192))
            stack.enter_context(patch("dsv2.training.build.load_kernels", lambda name: kernels))
        mesh = start_mesh(ParallelPlan(world=world_size, ep=world_size), rank, torch.device("cpu"))
        model = build_model(jobs.model_config(**sizes), runtime, 0, mesh)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        batch = jobs.cut(jobs.global_batch(0), rank * sequences, sequences)
        kept, peaks = [], []
        for _ in range(TIMES):
            with LiveMemory(known) as live:
                out = model(batch.input_ids, batch.labels, batch.sequence_ids)
                kept.append(live.total)
                out.loss.backward()
            peaks.append(live.peak)
        return min(kept), min(peaks)
