"""Profiled steps of real engines and of a job: the same numbers, and a trace of every rank that is named."""

from pathlib import Path
from typing import Any

import pytest

from dsv2.config.schema import Config, ProfileConfig
from dsv2.parallel.plan import Dim
from dsv2.profiling.trace import read
from tests.dist import jobs
from tests.dist.end_to_end import run, scalars

STEPS = [2, 3]


def profiled(rank: int, world_size: int, folder: str, steps: list[int] | None, **layout: Any) -> tuple:
    """Train four steps: losses, gradient norms, this rank's final weights, and the lines to print."""
    from dsv2.profiling.profiler import Profiler
    from dsv2.training.batches import share_of_step

    engine = jobs.make_engine(rank, world_size, micro_batch=2, **layout)
    config = Config(runs_dir=folder, profile=ProfileConfig(steps, ranks=None))
    lines = []
    numbers = []
    stream: Any = jobs.OneBatch(jobs.global_batch(0))
    with Profiler(config, engine, stream) as profiler:
        for number in range(1, 5):
            stream.batch = jobs.global_batch(number)
            stream.consumed = 0
            with profiler.step(number):
                share = share_of_step(stream, jobs.BATCH, 2, engine.mesh)
                result = engine.train_step(share, jobs.OPTIM.lr)
            numbers.append((result.loss, result.grad_norm))
            lines += profiler.finish()
    assert engine.mesh[Dim.world].rank == rank
    return numbers, jobs.owned(engine, "fp32"), lines


@pytest.mark.parametrize(("stage", "bf16"), [(1, True), (3, False)])
def test_profiled_ranks_train_bit_equal(pools, tmp_path, stage, bf16):
    layout = {"ep": 2, "stage": stage, "bf16": bf16, "recompute": True}
    plain = pools[2].run("tests.dist.test_profile:profiled", folder=str(tmp_path), steps=None, **layout)
    traced = pools[2].run("tests.dist.test_profile:profiled", folder=str(tmp_path), steps=STEPS, **layout)
    for (numbers, weights, none), (same, same_weights, lines) in zip(plain, traced, strict=True):
        assert none == []
        assert lines[0].startswith("profile: steps 2 to 3, ")
        assert numbers == same
        for (name, offset, _, values), (other, same_offset, _, same_values) in zip(
            weights, same_weights, strict=True
        ):
            assert (name, offset) == (other, same_offset)
            assert (values == same_values).all(), name
    for rank in range(2):
        found = read(tmp_path / "run" / "profile" / "step-2-3" / f"rank-{rank}.trace.json.gz")
        assert found.steps == 2
        assert sum(found.parts.values()) == pytest.approx(found.step_ms, rel=1e-6)
        expected = ("data", "attention", "routing", "dispatch", "routed experts", "shared experts")
        assert min(found.parts[part] for part in (*expected, "head, loss", "optimizer")) > 0
        assert 0 < found.backward["dispatch"] < found.parts["dispatch"]


def test_a_job_profiles_its_steps_and_prints_their_parts(begun: Path, command, tmp_path):
    words = ["profile.steps=[3,4]", "stop_step=5", "eval.every=0"]
    output = run(command("profiled", *words))
    losses = scalars(begun, "train/loss_total")
    assert scalars(tmp_path / "profiled", "train/loss_total") == {step: losses[step] for step in range(1, 6)}
    folder = tmp_path / "profiled" / "profile" / "step-3-4"
    lines = output.splitlines()
    begin = lines.index(f"profile: steps 3 to 4, {folder}; per step of rank 0:")
    assert lines[begin - 1].startswith("step  4/24  loss ")
    table = read(folder / "rank-0.trace.json.gz").table().splitlines()
    assert lines[begin + 2 : begin + 2 + len(table)] == [f"  {line}" for line in table]
    assert lines[begin + 2 + len(table)].startswith("step  5/24  loss ")
    assert "profiler_start" not in output
