"""The spike guard by value: what it refuses, counts and keeps."""

import json
import math

import numpy as np
import pytest

from dsv2.checkpoint.state import Loaded, RunState
from dsv2.config.schema import SpikeConfig, SpikePolicy
from dsv2.errors import Diverged
from dsv2.training.spikes import FEWEST, HORIZON, RunningStatistics, SpikeCounts, SpikeGuard

CALM = [2.0 + 0.1 * (-1) ** step for step in range(FEWEST)]  # mean 2, deviation 0.1


def guard(policy=SpikePolicy.skip, saved=None, **changes) -> SpikeGuard:
    return SpikeGuard(SpikeConfig(policy=policy, **changes), saved)


def feed(watch: SpikeGuard, losses: list[float], first: int = 1) -> list[bool]:
    answers = []
    for step, loss in enumerate(losses, start=first):
        accepts = watch.judge(step)
        assert accepts is not None
        answers.append(accepts(loss))
    return answers


def test_off_judges_nothing_and_keeps_nothing():
    watch = guard(SpikePolicy.off)
    assert watch.judge(1) is None
    assert watch.state_dict() is None
    assert watch.counts is None


@pytest.mark.parametrize(("loss", "accepted"), [(2.29, True), (2.31, False), (math.nan, False), (0.0, True)])
def test_a_spike_is_above_the_mean_by_so_many_deviations_or_not_finite(loss, accepted):
    watch = guard(deviations=3.0)
    assert feed(watch, [*CALM, loss]) == [True] * FEWEST + [accepted]
    assert watch.counts == SpikeCounts(skipped=int(not accepted), rewinds=0)


def test_nothing_but_infinity_is_a_spike_before_there_are_enough_values():
    assert feed(guard(), [*CALM[:-1], 1e9]) == [True] * FEWEST
    assert feed(guard(), [math.inf, 2.0]) == [False, True]


def test_a_spike_does_not_raise_the_mean():
    watch = guard()
    feed(watch, [*CALM, 100.0])
    assert watch.state_dict()["seen"]["mean"] == pytest.approx(2.0)


def test_too_many_spikes_without_progress_end_the_run():
    watch = guard(attempts=2)
    assert feed(watch, [*CALM, 9.0, 9.0]) == [True] * FEWEST + [False] * 2
    with pytest.raises(Diverged, match=r"^step 33: total loss 9.000, limit .*more than spike.attempts=2 "):
        feed(watch, [9.0], first=33)


def test_an_accepted_step_is_progress():
    watch = guard(attempts=2)
    assert feed(watch, [*CALM, 9.0, 9.0, 2.0, 9.0, 9.0]).count(False) == 4


def test_rewinding_to_the_same_place_again_and_again_is_no_progress():
    watch = guard(SpikePolicy.rewind, attempts=2)
    feed(watch, CALM)
    loaded = loaded_at(20, watch.state_dict())
    for _ in range(2):
        assert feed(watch, [9.0], first=31) == [False]
        assert watch.rewind(RunState(step=30), loaded).step == 20
        feed(watch, CALM[:10], first=21)  # accepted, but only up to the spike
    with pytest.raises(Diverged):
        feed(watch, [9.0], first=31)
    assert watch.counts == SpikeCounts(skipped=0, rewinds=2)


def loaded_at(step: int, spikes: dict | None) -> Loaded:
    from pathlib import Path

    state = RunState(step=step, tokens=10 * step, data={"consumed": step}, wandb_id="old", spikes=spikes)
    return Loaded(state, Path(), [], [], 0.0)


def test_a_rewind_takes_the_step_and_keeps_the_streams_position():
    """The batches since the checkpoint are left out, because the stream does not go back."""
    watch = guard(SpikePolicy.rewind)
    feed(watch, CALM[:10])
    saved = watch.state_dict()
    feed(watch, CALM[10:])
    now = RunState(step=30, tokens=300, data={"consumed": 10}, wandb_id="w")
    then = watch.rewind(now, loaded_at(10, saved))
    assert then == RunState(step=10, tokens=100, data={"consumed": 10}, wandb_id="w")
    assert watch.state_dict()["seen"] == saved["seen"]
    assert watch.rewind(now, None) == now
    assert watch.counts == SpikeCounts(skipped=0, rewinds=2)


def test_a_resumed_guard_decides_as_one_that_never_stopped():
    losses = np.random.default_rng(0).normal(3, 1, 200).tolist()
    one = guard(deviations=1.0, attempts=1000)
    whole = feed(one, losses)
    assert 10 < whole.count(False) < 100
    before = guard(deviations=1.0, attempts=1000)
    answers = feed(before, losses[:77])
    after = guard(deviations=1.0, attempts=1000, saved=json.loads(json.dumps(before.state_dict())))
    assert answers + feed(after, losses[77:], first=78) == whole
    assert after.state_dict() == one.state_dict()


def test_running_statistics_are_exact_at_first_and_then_forget():
    values = np.random.default_rng(0).normal(7, 2, HORIZON)
    running = RunningStatistics()
    for value in values:
        running.add(value)
    assert (running.mean, running.deviation) == pytest.approx((values.mean(), values.std()), rel=1e-12)
    for _ in range(20 * HORIZON):
        running.add(1.0)
    assert (running.mean, running.deviation) == pytest.approx((1.0, 0.0), abs=1e-3)
