"""Learning-rate schedule and batch ramp against slow loops and the published recipe."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.config.schema import Config, OptimConfig, RuntimeConfig
from dsv2.training.schedule import batch_size_at, count_steps, lr_at, plan_steps
from dsv2.training.validate import validate
from tests.unit.helpers import properties

# Section 3.1.2: 2304 -> 9216 sequences of 4096 tokens over the first 225 B of 8.1 T tokens.
V2 = OptimConfig(
    lr=2.4e-4,
    total_tokens=8_100_000_000_000,
    warmup_steps=2000,
    batch_size=9216,
    batch_size_start=2304,
    batch_ramp_tokens=225_000_000_000,
    batch_ramp_increment=64,
)


@st.composite
def ramps(draw) -> OptimConfig:
    start = draw(st.integers(1, 20))
    ramped = draw(st.booleans())
    return OptimConfig(
        total_tokens=draw(st.integers(1, 20_000)),
        warmup_steps=draw(st.integers(0, 30)),
        decay_at=sorted(draw(st.lists(st.floats(0.01, 0.99), max_size=3, unique=True))),
        batch_size=start + draw(st.integers(0, 60)),
        batch_size_start=start if ramped else None,
        batch_ramp_tokens=draw(st.integers(1, 30_000)),  # may exceed the run
        batch_ramp_increment=draw(st.integers(1, 9)),
    )


lengths = st.integers(1, 40)


@properties
@given(config=ramps(), length=lengths)
def test_plan_against_a_loop(config, length):
    """Steps until the tokens are seen; the ramp is the largest reachable size not above the line."""
    tokens = step = 0
    for plan in plan_steps(config, length):
        size = config.batch_size
        if config.batch_size_start is not None and tokens < config.batch_ramp_tokens:
            size = config.batch_size_start
            grown = (config.batch_size - size) * tokens
            while (
                size + config.batch_ramp_increment - config.batch_size_start
            ) * config.batch_ramp_tokens <= grown:
                size += config.batch_ramp_increment
        lr = config.lr
        if step + 1 < config.warmup_steps:
            lr *= (step + 1) / config.warmup_steps
        for fraction in config.decay_at:
            if tokens >= fraction * config.total_tokens:
                lr *= config.decay_factor
        assert plan[:4] == (step, tokens, tokens + size * length, size)
        assert plan.lr == pytest.approx(lr, rel=1e-12)
        assert tokens < config.total_tokens
        step, tokens = step + 1, tokens + size * length
    assert tokens >= config.total_tokens
    assert count_steps(config, length) == step


@properties
@given(config=ramps(), length=lengths)
def test_ramp_is_monotone_and_moves_in_increments(config, length):
    sizes = [plan.batch_size for plan in plan_steps(config, length)]
    assert sizes[0] == (config.batch_size if config.batch_size_start is None else config.batch_size_start)
    for size, following in pairwise(sizes):
        assert following >= size
        assert following == config.batch_size or (following - size) % config.batch_ramp_increment == 0
    assert max(sizes) <= config.batch_size


@properties
@given(config=ramps(), length=lengths, at=st.integers(0, 200))
def test_plan_resumes_where_it_stopped(config, length, at):
    plans = list(plan_steps(config, length))
    at = min(at, len(plans) - 1)
    assert list(plan_steps(config, length, plans[at].step, plans[at].tokens)) == plans[at:]


def test_warm_up_then_two_decays():
    config = OptimConfig(lr=1.0, total_tokens=1000, warmup_steps=4, batch_size=10, decay_at=[0.6, 0.9])
    rates = [plan.lr for plan in plan_steps(config, sequence_length=1)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    # Step i starts after 10 i tokens: 600 is step 60, 900 is step 90.
    assert rates[4:60] == [1.0] * 56
    assert rates[60:90] == pytest.approx([0.316] * 30)
    assert rates[90:] == pytest.approx([0.316**2] * 10)


def test_warm_up_may_be_absent():
    assert lr_at(OptimConfig(lr=1.0, warmup_steps=0), 0, 0) == 1.0


def test_decay_may_come_within_warm_up():
    config = OptimConfig(lr=1.0, total_tokens=10, warmup_steps=10, decay_at=[0.5])
    assert lr_at(config, 4, 5) == pytest.approx(0.5 * 0.316)


def test_recipe_of_v2():
    tokens_a_sequence = 4096
    assert batch_size_at(V2, 0) == 2304
    assert batch_size_at(V2, 112_500_000_000) == (2304 + 9216) // 2
    assert batch_size_at(V2, 224_999_999_999) == 9216 - 64
    assert batch_size_at(V2, 225_000_000_000) == 9216
    assert lr_at(V2, 0, 0) == pytest.approx(2.4e-4 / 2000)
    assert lr_at(V2, 1998, 0) < lr_at(V2, 1999, 0) == lr_at(V2, 2000, 0) == 2.4e-4
    assert lr_at(V2, 10**5, 4_859_999_990_000) == 2.4e-4
    assert lr_at(V2, 10**5, 4_860_000_000_000) == pytest.approx(2.4e-4 * 0.316)
    assert lr_at(V2, 10**5, 7_290_000_000_000) == pytest.approx(2.4e-4 * 0.316**2)
    # On the ramp d(steps)/d(tokens) is 1 / size, of a size linear in the tokens: a logarithm.
    ramp = 225e9 / (9216 - 2304) * 1.3862944 / tokens_a_sequence  # ln 4
    constant = (8.1e12 - 225e9) / 9216 / tokens_a_sequence
    assert count_steps(V2, tokens_a_sequence) == pytest.approx(ramp + constant, rel=1e-3)


def test_recipe_of_lite():
    lite = replace(V2, lr=4.2e-4, total_tokens=5_700_000_000_000, batch_size=4608, batch_size_start=None)
    lite.decay_at = [0.8, 0.9]
    assert [batch_size_at(lite, t) for t in (0, 10**12)] == [4608, 4608]
    assert lr_at(lite, 10**5, 4_559_999_990_000) == 4.2e-4
    assert lr_at(lite, 10**5, 4_560_000_000_000) == pytest.approx(4.2e-4 * 0.316)
    assert count_steps(lite, 4096) == -(-5_700_000_000_000 // (4608 * 4096))


@pytest.mark.parametrize(("increment", "micro_batch", "world"), [(64, 8, 8), (256, 2, 128)])
def test_every_size_on_the_ramp_fits_the_layout(increment, micro_batch, world):
    """What validate() accepts never meets a batch that the ranks cannot share."""
    optim = replace(V2, batch_ramp_increment=increment)
    config = Config(optim=optim, runtime=RuntimeConfig(micro_batch_size=micro_batch))
    validate(config, world)
    sizes = {batch_size_at(optim, tokens) for tokens in range(0, 230_000_000_000, 10**9)}
    assert len(sizes) > 20
    assert all(size % (micro_batch * world) == 0 for size in sizes)
