"""The published recipes as shipped: conf/experiment/v2.yaml and lite.yaml, walked to their last token."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import pytest

from dsv2.config.schema import Config, Precision
from dsv2.errors import UserError
from dsv2.training.schedule import StepPlan, count_steps, plan_steps
from dsv2.training.validate import validate
from tests.unit.helpers import REPO, compose_config, cpu_seconds_of_children

PATH = "data.path=somewhere"
STEP_OF_RAMP = 256  # sequences


def steps(config: Config) -> Iterator[StepPlan]:
    return plan_steps(config.optim, config.data.sequence_length)


@pytest.mark.parametrize(
    ("name", "peak", "tokens", "decays", "alphas", "dropping"),
    [
        ("v2", 2.4e-4, 8.1e12, [0.6, 0.9], (0.003, 0.05, 0.02), True),
        ("lite", 4.2e-4, 5.7e12, [0.8, 0.9], (0.001, 0.0, 0.0), False),
    ],
)
def test_values_of_the_paper(name, peak, tokens, decays, alphas, dropping):
    config = compose_config(f"experiment={name}", PATH)
    optim, model, parallel = config.optim, config.model, config.parallel
    assert (optim.lr, optim.total_tokens, optim.decay_at) == (peak, tokens, decays)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert (optim.warmup_steps, optim.decay_factor) == (2000, 0.316)
    assert (config.data.sequence_length, model.initializer_range) == (4096, 0.006)
    balance = model.balance
    assert (balance.alpha_expert, balance.alpha_device, balance.alpha_comm) == alphas
    assert balance.token_dropping is dropping
    assert (balance.capacity_factor, balance.exempt_fraction) == (1.0, 0.1)
    assert (parallel.expert_parallel_size, parallel.zero_stage) == (8, 1)
    assert config.runtime.precision is Precision.bf16
    assert config.name == name


def test_v2_walked_over_all_its_tokens():
    """Every step of 8.1 T tokens, against the paper's boundaries in exact tokens and steps."""
    config = compose_config("experiment=v2", PATH)
    sizes: dict[int, int] = {}  # batch size: tokens seen when it was first used
    rates: dict[float, tuple[int, int]] = {}  # rate after warm-up: (step, tokens) of its first use
    expected_tokens = 0
    last = None
    for plan in steps(config):
        assert plan.tokens == expected_tokens
        expected_tokens += plan.batch_size * 4096
        sizes.setdefault(plan.batch_size, plan.tokens)
        if plan.step < 2000:
            assert plan.lr == pytest.approx(2.4e-4 * (plan.step + 1) / 2000, rel=1e-12)
        else:
            rates.setdefault(plan.lr, (plan.step, plan.tokens))
        last = plan
    assert last is not None
    # The ramp: 2304, 2560, ..., 9216, each first used where the straight line to 225 B tokens reaches it.
    assert list(sizes) == list(range(2304, 9216 + 1, STEP_OF_RAMP))
    for size, tokens in sizes.items():
        line = 225_000_000_000 * (size - 2304) // 6912
        assert 0 <= tokens - line <= 9216 * 4096, size
    assert 225_000_000_000 <= sizes[9216] < 225_000_000_000 + 9216 * 4096
    # The rate: the peak, then x 0.316 at 60 % and again at 90 % of 8.1 T tokens.
    assert list(rates) == pytest.approx([2.4e-4, 2.4e-4 * 0.316, 2.4e-4 * 0.316**2], rel=1e-12)
    (first_step, _), (_, second), (_, third) = rates.values()
    assert first_step == 2000
    assert 4_860_000_000_000 <= second < 4_860_000_000_000 + 9216 * 4096
    assert 7_290_000_000_000 <= third < 7_290_000_000_000 + 9216 * 4096
    assert last.tokens < 8_100_000_000_000 <= last.tokens_after
    assert last.step + 1 == count_steps(config.optim, 4096)


def test_lite_walked_over_all_its_tokens():
    config = compose_config("experiment=lite", PATH)
    plans = list(steps(config))
    assert {plan.batch_size for plan in plans} == {4608}
    assert len(plans) == -(-5_700_000_000_000 // (4608 * 4096))
    changes = [b for a, b in pairwise(plans[1999:]) if a.lr != b.lr]
    assert [plan.lr for plan in changes] == pytest.approx([4.2e-4 * 0.316, 4.2e-4 * 0.316**2], rel=1e-12)
    for plan, boundary in zip(changes, (4_560_000_000_000, 5_130_000_000_000), strict=True):
        assert boundary <= plan.tokens < boundary + 4608 * 4096
    assert plans[1999].lr == 4.2e-4 == plans[2000].lr
    assert plans[1998].lr < 4.2e-4


@pytest.mark.parametrize("processes", [8, 16, 32, 64, 128, 256])
def test_v2_on_powers_of_two(processes):
    config = compose_config("experiment=v2", PATH)
    validate(config, processes)
    assert all(plan.batch_size % processes == 0 for plan in steps(config))


def test_v2_on_more_processes_needs_larger_increments():
    with pytest.raises(UserError, match=r"optim.batch_ramp_increment=256: must be a multiple of 768"):
        validate(compose_config("experiment=v2", PATH), 768)
    config = compose_config("experiment=v2", PATH, "optim.batch_ramp_increment=768")
    validate(config, 768)
    assert all(plan.batch_size % 768 == 0 for plan in steps(config))


@pytest.mark.parametrize("processes", [8, 16, 64, 256, 512, 1536, 4608])
def test_lite_on_what_divides_its_batch(processes):
    validate(compose_config("experiment=lite", PATH), processes)


@pytest.mark.parametrize("name", ["v2", "lite"])
def test_the_data_must_be_named(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPO / "train.py"), f"experiment={name}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: data.path: must be given, as data.path=FOLDER with a folder that `python -m dsv2 prepare` "
        "wrote\n"
    )


@pytest.mark.parametrize("name", ["v2", "lite"])
def test_the_resolved_recipe_is_printed_at_once(name, tmp_path):
    before = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, str(REPO / "train.py"), "--cfg", "job", f"experiment={name}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert cpu_seconds_of_children() - before < 4
    assert done.returncode == 0, done.stderr
    assert f"name: {name}" in done.stdout
    assert "path: ???" in done.stdout
