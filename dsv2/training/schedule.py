"""Learning rate and batch size as pure functions of the tokens seen (arXiv 2405.04434, section 3.1.2)."""

from collections.abc import Iterator
from typing import NamedTuple

from dsv2.config.rules import refuse
from dsv2.config.schema import Config, OptimConfig


class StepPlan(NamedTuple):
    """One optimizer step before it is taken."""

    step: int  # counted from 0
    tokens: int  # seen before this step
    tokens_after: int
    batch_size: int  # sequences of this step, over all ranks
    lr: float


def batch_size_at(config: OptimConfig, tokens: int) -> int:
    """Return the sequences of the step that starts after `tokens` tokens.

    The ramp is linear in the tokens. It grows by whole increments, so it does not depend on the layout.
    """
    start = config.batch_size_start
    full = config.batch_size
    if start is None or tokens >= config.batch_ramp_tokens:
        return full
    grown = (full - start) * tokens // config.batch_ramp_tokens
    return start + grown // config.batch_ramp_increment * config.batch_ramp_increment


def _next_growth(config: OptimConfig, tokens: int) -> int:
    """Return the number of tokens at which the batch of the step at `tokens` grows next."""
    start = config.batch_size_start
    assert start is not None, "only a ramp has growing batches"
    if start == config.batch_size:
        return config.batch_ramp_tokens
    grown = batch_size_at(config, tokens) - start + config.batch_ramp_increment
    return -(-grown * config.batch_ramp_tokens // (config.batch_size - start))


def lr_at(config: OptimConfig, step: int, tokens: int) -> float:
    """Return the rate: linear warm-up, then the peak times `decay_factor` per `decay_at` fraction passed."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    passed = sum(tokens >= fraction * config.total_tokens for fraction in config.decay_at)
    return config.lr * warmup * config.decay_factor**passed


def plan_step(config: OptimConfig, sequence_length: int, step: int, tokens: int) -> StepPlan | None:
    """Return the step after (`step`, `tokens`); None if `total_tokens` are seen. The last may overshoot."""
    if tokens >= config.total_tokens:
        return None
    batch_size = batch_size_at(config, tokens)
    after = tokens + batch_size * sequence_length
    return StepPlan(step, tokens, after, batch_size, lr_at(config, step, tokens))


def plan_steps(
    config: OptimConfig, sequence_length: int, step: int = 0, tokens: int = 0
) -> Iterator[StepPlan]:
    """Yield every step from (`step`, `tokens`) to the end of the run."""
    while plan := plan_step(config, sequence_length, step, tokens):
        yield plan
        step = plan.step + 1
        tokens = plan.tokens_after


def count_steps(config: OptimConfig, sequence_length: int, step: int = 0, tokens: int = 0) -> int:
    """Return the steps of the whole run, of which `step` steps with `tokens` tokens are done."""
    end = min(config.total_tokens, config.batch_ramp_tokens) if config.batch_size_start else 0
    while tokens < end:
        tokens_per_step = batch_size_at(config, tokens) * sequence_length
        steps = -(-(min(end, _next_growth(config, tokens)) - tokens) // tokens_per_step)
        tokens += steps * tokens_per_step
        step += steps
    rest = max(0, config.total_tokens - tokens)
    return step + -(-rest // (config.batch_size * sequence_length))


def check_profiled_steps(config: Config, step: int, tokens: int) -> None:
    """Refuse to profile steps that the run does not have.

    Args:
        config: validated.
        step: steps done where the session begins.
        tokens: seen by then.

    Raises:
        UserError: names the field, its value and what would be right.
    """
    if config.profile.steps is None:
        return
    steps = count_steps(config.optim, config.data.sequence_length, step, tokens)
    if config.profile.steps[1] > steps:
        right = f"must end at step {steps} or earlier, the last step of the run"
        refuse("profile.steps", config.profile.steps, right)


def check_warmup(config: OptimConfig, sequence_length: int) -> None:
    """Refuse a warm-up that is longer than the run, whose rate would never reach its peak.

    Raises:
        UserError: names the field, its value and what would be right.
    """
    steps = count_steps(config, sequence_length)
    if config.warmup_steps > steps:
        refuse(
            "optim.warmup_steps",
            config.warmup_steps,
            f"must be at most {steps}, the steps of the run; optim.warmup_steps={steps // 10} suits its "
            f"optim.total_tokens={config.total_tokens}",
        )
