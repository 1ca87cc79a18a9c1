"""Learning-rate schedule and batch ramp as pure functions of the tokens seen (section 3.1.2)."""

from collections.abc import Iterator
from typing import NamedTuple

from dsv2.config.schema import OptimConfig


class StepPlan(NamedTuple):
    step: int  # 0-based
    tokens: int  # seen before this step
    tokens_after: int
    batch_size: int  # sequences of this step
    lr: float


def batch_size_at(config: OptimConfig, tokens: int) -> int:
    """Sequences of the step that starts after `tokens` tokens.

    The ramp is linear in the tokens and moves in whole increments, so that it does not depend on the
    layout.
    """
    start, full = config.batch_size_start, config.batch_size
    if start is None or tokens >= config.batch_ramp_tokens:
        return full
    grown = (full - start) * tokens // config.batch_ramp_tokens
    return start + grown // config.batch_ramp_increment * config.batch_ramp_increment


def lr_at(config: OptimConfig, step: int, tokens: int) -> float:
    """Linear warm-up, then the peak times `decay_factor` for every fraction of the tokens passed."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    passed = sum(tokens >= fraction * config.total_tokens for fraction in config.decay_at)
    return config.lr * warmup * config.decay_factor**passed


def plan_steps(
    config: OptimConfig, sequence_length: int, step: int = 0, tokens: int = 0
) -> Iterator[StepPlan]:
    """Every step from (`step`, `tokens`) until `total_tokens` are seen; the last may overshoot."""
    while tokens < config.total_tokens:
        batch_size = batch_size_at(config, tokens)
        after = tokens + batch_size * sequence_length
        yield StepPlan(step, tokens, after, batch_size, lr_at(config, step, tokens))
        step, tokens = step + 1, after


def count_steps(config: OptimConfig, sequence_length: int, step: int = 0, tokens: int = 0) -> int:
    """The number of the last step, counted from 1, of a run that stands at (`step`, `tokens`)."""
    while tokens < min(config.total_tokens, config.batch_ramp_tokens):
        tokens += batch_size_at(config, tokens) * sequence_length
        step += 1
    rest = max(0, config.total_tokens - tokens)
    return step + -(-rest // (config.batch_size * sequence_length))
