"""A slow rank is told from the ranks that wait for it."""

import time

import torch

from dsv2.config.schema import RuntimeConfig
from dsv2.parallel.clock import Times
from tests.dist import jobs

SLOW_MS = 400


def forward(rank: int, world_size: int, slow: int) -> Times:
    """A forward pass in which one rank computes slowly, before the experts' exchange."""
    from dsv2.parallel.plan import ParallelPlan
    from dsv2.parallel.start import start_mesh
    from dsv2.training.build import build_model

    mesh = start_mesh(ParallelPlan(world=world_size, ep=world_size), rank, torch.device("cpu"))
    model = build_model(jobs.model_config(), RuntimeConfig(), 0, mesh)
    batch = jobs.cut(jobs.global_batch(0), rank * 2, 2)
    inputs = (batch.input_ids, batch.labels, batch.sequence_ids)
    model(*inputs)  # the first pass takes longer
    mesh.clock.take()
    with mesh.clock.working(mesh.device):
        if rank == slow:
            time.sleep(SLOW_MS / 1e3)
        model(*inputs)
    assert mesh.hosts == mesh.hosts[:1] * world_size
    return mesh.clock.take()


def test_the_slow_rank_works_and_the_other_one_waits(pools):
    for slow in (0, 1):
        times = pools[2].run("tests.dist.test_slow_rank:forward", slow=slow)
        assert times[slow].work_ms > SLOW_MS
        assert times[1 - slow].wait_ms > SLOW_MS / 2
        assert times[slow].work_ms > times[1 - slow].work_ms + SLOW_MS / 2
