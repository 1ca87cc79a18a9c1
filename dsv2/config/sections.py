"""Checks of the sections that no part of the model or the layout checks. Each raises UserError."""

import math
import re
from dataclasses import fields

from dsv2.config.rules import (
    TOKENS,
    refuse,
    require_above_0,
    require_fraction,
    require_positive,
    require_seed,
)
from dsv2.config.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LoggingConfig,
    OptimConfig,
    ProfileConfig,
    SpikeConfig,
)

LARGEST_BATCH = 10**6  # sequences


def check_run(config: Config) -> None:
    """Check the fields outside any section."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", config.name) or config.name in (".", ".."):
        right = "must be a plain folder name, such as my-run: at most 100 letters, digits, '.', '_' and '-'"
        refuse("name", repr(config.name), right)
    if not config.runs_dir.strip():
        refuse("runs_dir", repr(config.runs_dir), "must be a folder, such as runs")
    require_seed("seed", config.seed)
    if config.new_stage and config.resume in ("auto", "never"):
        refuse("resume", config.resume, "must be the path of a checkpoint to start from with new_stage=true")
    if config.stop_step is not None and config.stop_step < 1:
        refuse("stop_step", config.stop_step, "must be at least 1, or null")
    if config.data.sequence_length > config.model.max_position_embeddings:
        refuse(
            "data.sequence_length",
            config.data.sequence_length,
            f"must be at most model.max_position_embeddings={config.model.max_position_embeddings}",
        )


def check_schedule(optim: OptimConfig, sequence_length: int) -> None:
    """Check the lengths, batch sizes and rates; the optimizer checks its own fields."""
    require_positive("optim", optim, ["total_tokens"], most=TOKENS)
    require_positive("optim", optim, ["batch_size", "batch_ramp_increment"], most=LARGEST_BATCH)
    require_positive("optim", optim, ["warmup_steps", "weight_decay"], least=0)
    require_positive("optim", optim, ["batch_ramp_tokens"], least=0, most=TOKENS)
    require_fraction("optim", optim, ["decay_factor"])
    require_above_0("optim", optim, ["lr", "grad_clip"])
    if optim.decay_at != sorted(set(optim.decay_at)) or not all(0 < f < 1 for f in optim.decay_at):
        refuse("optim.decay_at", optim.decay_at, "must be rising shares of the tokens, such as [0.6, 0.9]")
    if optim.batch_size * sequence_length > optim.total_tokens:
        refuse(
            "optim.batch_size",
            optim.batch_size,
            f"must be at most {optim.total_tokens // sequence_length}: a step of data.sequence_length="
            f"{sequence_length} may not see more than optim.total_tokens={optim.total_tokens}",
        )
    start = optim.batch_size_start
    if start is not None and not 1 <= start <= optim.batch_size:
        refuse("optim.batch_size_start", start, f"must be from 1 to optim.batch_size={optim.batch_size}")
    if start is None and optim.batch_ramp_tokens > 0:
        refuse("optim.batch_size_start", None, "must be given when optim.batch_ramp_tokens is above 0")
    if start is not None and optim.batch_ramp_tokens == 0:
        refuse("optim.batch_ramp_tokens", 0, "must be above 0 when optim.batch_size_start is given")


def check_spike(spike: SpikeConfig) -> None:
    require_above_0("spike", spike, ["deviations"])
    require_positive("spike", spike, ["attempts"])


def check_logging(logging: LoggingConfig) -> None:
    """Check the numbers of steps and windows, and every limit of an alert."""
    counts = ["every", "maps_every", "alert_windows", "alert_spike_steps"]
    require_positive("logging", logging, counts)
    for field in fields(logging):
        if not field.name.startswith("alert_") or field.name in counts:
            continue
        limit = getattr(logging, field.name)
        if limit is not None and not 0 <= limit < math.inf:
            right = "must be at least 0 and finite; 0 or null turns the alert off"
            refuse(f"logging.{field.name}", limit, right)
    if logging.alert_dead is not None and logging.alert_dead > 1:
        refuse("logging.alert_dead", logging.alert_dead, "must be a share of the experts, at most 1")


def check_profile(profile: ProfileConfig, world_size: int, stop_step: int | None) -> None:
    """Check the steps, as far as no checkpoint is needed, and the ranks."""
    if profile.ranks is not None and (
        not profile.ranks
        or len(set(profile.ranks)) < len(profile.ranks)
        or not set(profile.ranks) <= set(range(world_size))
    ):
        ranks = "0" if world_size == 1 else f"ranks from 0 to {world_size - 1}, each once"
        refuse("profile.ranks", profile.ranks, f"must list {ranks}; or null, for every rank")
    if profile.steps is None:
        return
    if len(profile.steps) != 2:
        refuse("profile.steps", profile.steps, "must be the first and the last step, such as [100,103]")
    first, last = profile.steps
    if not 1 <= first <= last:
        right = "must be a first step, at least 1, and a last step that is not before it, such as [100,103]"
        refuse("profile.steps", profile.steps, right)
    if stop_step is not None and last > stop_step:
        refuse("profile.steps", profile.steps, f"must end at stop_step={stop_step} or earlier")


def check_eval(evaluation: EvalConfig) -> None:
    require_positive("eval", evaluation, ["sequences"])
    require_positive("eval", evaluation, ["every", "sample_tokens"], least=0)


def check_checkpoint(checkpoint: CheckpointConfig) -> None:
    require_positive("checkpoint", checkpoint, ["every", "keep_every"], least=0)
    require_positive("checkpoint", checkpoint, ["keep"])
