"""Learning rate and batch size as pure functions of the tokens seen (arXiv 2405.04434, section 3.1.2)."""

from collections.abc import Iterator
from typing import NamedTuple

from dsv2.config.schema import OptimConfig


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


def lr_at(config: OptimConfig, step: int, tokens: int) -> float:
    """Return the rate: linear warm-up, then the peak times `decay_factor` per `decay_at` fraction passed."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    passed = sum(tokens >= fraction * config.total_tokens for fraction in config.decay_at)
    return config.lr * warmup * config.decay_factor**passed


def plan_steps(
    config: OptimConfig, sequence_length: int, step: int = 0, tokens: int = 0
) -> Iterator[StepPlan]:
    """Yield every step from (`step`, `tokens`) until `total_tokens` are seen; the last one may overshoot."""
    while tokens < config.total_tokens:
        batch_size = batch_size_at(config, tokens)
        after = tokens + batch_size * sequence_length
        yield StepPlan(step, tokens, after, batch_size, lr_at(config, step, tokens))
        step += 1
        tokens = after


def count_steps(config: OptimConfig, sequence_length: int, step: int = 0, tokens: int = 0) -> int:
    """Return the steps of the whole run, of which `step` steps with `tokens` tokens are done."""
    while tokens < min(config.total_tokens, config.batch_ramp_tokens):
        tokens += batch_size_at(config, tokens) * sequence_length
        step += 1
    rest = max(0, config.total_tokens - tokens)
    return step + -(-rest // (config.batch_size * sequence_length))
