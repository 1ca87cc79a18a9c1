"""A spike's update is not applied, on any stage; and a run that rewinds resumes exactly."""

from typing import Any

import numpy as np
import pytest

from dsv2.config.schema import Precision
from tests.dist import jobs
from tests.dist.end_to_end import assert_same_bits, run, scalars, weights

KEYS = ("fp32", "exp_avg", "exp_avg_sq")
BF16 = {"ep": 2, "stage": 1, "micro_batch": 2, "bf16": True}
LAYOUTS = {
    "ZeRO-0": (1, {"ep": 1, "stage": 0, "micro_batch": 4}),
    "ZeRO-1": (2, {"ep": 2, "stage": 1, "micro_batch": 2}),
    "ZeRO-2": (2, {"ep": 2, "stage": 2, "micro_batch": 2}),
    "ZeRO-3": (2, {"ep": 2, "stage": 3, "micro_batch": 2}),
    "ZeRO-1 bf16": (2, BF16),
    "ZeRO-1 bf16 states": (2, {**BF16, "states": Precision.bf16}),
}


def steps(rank: int, world_size: int, refused: list[int], taken: list[int], **layout: Any) -> Any:
    """Run on every rank: take these steps' batches; those in `refused` get no update.

    Returns all shards, the count of updates, and what the steps returned as `updated`.
    """
    from dsv2.training.batches import share_of_step

    engine = jobs.make_engine(rank, world_size, **layout)
    updated = []
    for step in taken:
        stream: Any = jobs.OneBatch(jobs.global_batch(step))
        share = share_of_step(stream, jobs.BATCH, layout["micro_batch"], engine.mesh)
        result = engine.train_step(share, jobs.OPTIM.lr, lambda loss, step=step: step not in refused)
        assert np.isfinite(result.grad_norm)
        updated.append(result.updated)
    return [jobs.owned(engine, key) for key in KEYS], float(engine.sharded.steps_done), updated


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_refused_step_leaves_no_trace(layout, pools):
    world_size, arguments = LAYOUTS[layout]
    job = "tests.dist.test_spikes:steps"
    skipped = pools[world_size].run(job, refused=[1], taken=[0, 1, 2], **arguments)
    without = pools[world_size].run(job, refused=[], taken=[0, 2], **arguments)
    for (ours, count, updated), (theirs, expected, _) in zip(skipped, without, strict=True):
        assert updated == [True, False, True]
        assert count == expected == 2
        for key, left, right in zip(KEYS, ours, theirs, strict=True):
            assert left, key
            for (name, *_, value), (_, *_, wanted) in zip(left, right, strict=True):
                np.testing.assert_array_equal(value, wanted, err_msg=f"{key} {name}")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # `weights` wants it so
@pytest.mark.timeout(1800)
def test_a_run_that_rewinds_resumes_to_the_bit(command, tmp_path):
    """The loss hardly falls, and with a low limit its noise is a spike, before and after step 40."""
    settings = ["spike.policy=rewind", "spike.deviations=0.5", "spike.attempts=1000", "optim.lr=1e-7"]
    settings += ["eval.every=100", "optim.total_tokens=12800"]  # 50 steps
    output = run(command("whole", *settings))
    spikes = [int(line.split()[2].rstrip(":")) for line in output.splitlines() if "back to step" in line]
    assert min(spikes) <= 40 < max(spikes)
    run(command("parts", *settings, "stop_step=40"))
    run(command("parts", *settings))
    assert_same_bits(weights(tmp_path / "parts", 50), weights(tmp_path / "whole", 50))
    for name in ("train/loss_total", "spike/rewinds"):
        assert scalars(tmp_path / "parts", name) == scalars(tmp_path / "whole", name)
    assert scalars(tmp_path / "whole", "spike/rewinds")[50] == len(spikes)
