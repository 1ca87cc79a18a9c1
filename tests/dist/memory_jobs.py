"""What a rank really holds: run by the pool's processes for test_plan_memory.py."""

import gc
from typing import Any

import torch

from tests.dist import jobs
from tests.live import LiveMemory


def measure(rank: int, world_size: int, steps: int, micro_batches: int, **layout: Any) -> tuple[int, int]:
    """(bytes held after the steps, most bytes during the last one) of this rank's engine."""
    batch = jobs.cut(jobs.global_batch(0), 0, layout["micro_batch"])
    gc.collect()  # engines of earlier jobs are cycles
    with LiveMemory() as live:
        engine = jobs.make_engine(rank, world_size, **layout)
        for _ in range(steps):
            gc.collect()
            live.peak = live.total
            engine.train_step([batch] * micro_batches, lr=1e-3)
        gc.collect()
        return live.total, live.peak


def kept_by_forward(rank: int, world_size: int, ep: int, sequences: int) -> int:
    """Bytes of the distinct storages that one forward keeps for its backward, without the weights'."""
    from dsv2.config import ParallelConfig
    from dsv2.engine import build_model
    from dsv2.parallel.deepspeed_moe import start_mesh

    mesh = start_mesh(torch.device("cpu"), rank, world_size, ep)
    model = build_model(jobs.model_config(v_head_dim=12), ParallelConfig(expert_parallel_size=ep), 0, mesh)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = jobs.cut(jobs.global_batch(0), rank * sequences, sequences)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch.input_ids, batch.labels, batch.sequence_ids)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)
