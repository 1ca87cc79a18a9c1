"""Loss spikes: recognise a step whose loss is far above its running mean, before its update is applied.

Every rank judges the same global loss, so all ranks decide alike without asking one another. The guard's
state is part of each checkpoint. A resumed run therefore takes the decisions of a run that never stopped.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv2.checkpoint.state import Loaded, RunState
from dsv2.config.schema import SpikeConfig, SpikePolicy
from dsv2.errors import Diverged

if TYPE_CHECKING:
    from dsv2.training.results import StepResult

HORIZON = 100  # values after which the running mean and deviation have forgotten a value
FEWEST = 30  # values before the deviation is used


@dataclass
class RunningStatistics:
    """Mean and standard deviation: exact over the first `HORIZON` values, then forgetting exponentially."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def deviation(self) -> float:
        return math.sqrt(self.variance)

    def limit(self, deviations: float) -> float:
        """Return the mean plus so many deviations; infinity before there are enough values."""
        return math.inf if self.count < FEWEST else self.mean + deviations * self.deviation

    def add(self, value: float) -> None:
        """Take one more value into account."""
        self.count += 1
        weight = 1 / min(self.count, HORIZON)
        distance = value - self.mean
        self.mean += weight * distance
        self.variance = (1 - weight) * (self.variance + weight * distance**2)


class SpikeCounts(NamedTuple):
    """What a run has refused since its first step."""

    skipped: int  # steps without an update
    rewinds: int


class SpikeGuard:
    """Judges every step's loss as `spike.policy` says, and counts what it refuses.

    Args:
        saved: the state in a checkpoint; None at the start of a run.
    """

    def __init__(self, config: SpikeConfig, saved: Mapping[str, Any] | None):
        self._config = config
        self._skipped = 0
        self._rewinds = 0
        self._in_a_row = 0  # spikes since the last progress
        self._furthest = 0  # the last step that was a spike; an accepted later step is progress
        self._seen = RunningStatistics()
        if saved is not None:
            self._skipped = saved["skipped"]
            self._rewinds = saved["rewinds"]
            self._in_a_row = saved["in_a_row"]
            self._furthest = saved["furthest"]
            self._seen = RunningStatistics(**saved["seen"])

    @property
    def is_on(self) -> bool:
        return self._config.policy is not SpikePolicy.off

    @property
    def counts(self) -> SpikeCounts | None:
        """Return the counts so far; None if the policy is off."""
        return SpikeCounts(self._skipped, self._rewinds) if self.is_on else None

    def judge(self, step: int) -> Callable[[float], bool] | None:
        """Return what decides whether a step's update may be applied; None if the policy is off.

        Args:
            step: counted from 1.
        """
        return partial(self._accepts, step) if self.is_on else None

    def _accepts(self, step: int, loss: float) -> bool:
        """Judge the loss of the global batch, which is the same on every rank.

        Raises:
            Diverged: on every rank, after more than `spike.attempts` spikes without progress.
        """
        limit = self._seen.limit(self._config.deviations)
        if math.isfinite(loss) and loss <= limit:
            self._seen.add(loss)
            if step > self._furthest:
                self._in_a_row = 0
            return True
        self._in_a_row += 1
        self._furthest = max(self._furthest, step)
        if self._in_a_row > self._config.attempts:
            raise Diverged(
                f"step {step}: total loss {loss:.3f}, limit {limit:.3f}; more than spike.attempts="
                f"{self._config.attempts} spikes without progress; this step is not saved; "
                "try a lower optim.lr"
            )
        if self._config.policy is SpikePolicy.skip:
            self._skipped += 1
        return False

    def asks_to_rewind(self, result: "StepResult") -> bool:
        """Return whether this step was a spike and the policy is to rewind."""
        return not result.updated and self._config.policy is SpikePolicy.rewind

    def rewind(self, state: RunState, loaded: Loaded | None) -> RunState:
        """Return the state to continue from: the checkpoint's step, and the stream's present position.

        Without a checkpoint the same step is taken again, with the next batches.
        """
        self._rewinds += 1
        if loaded is None:
            return state
        saved = loaded.state.spikes
        self._seen = RunningStatistics(**saved["seen"]) if saved else RunningStatistics()
        return replace(state, step=loaded.state.step, tokens=loaded.state.tokens)

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps; None if the policy is off."""
        if not self.is_on:
            return None
        return {
            "skipped": self._skipped,
            "rewinds": self._rewinds,
            "in_a_row": self._in_a_row,
            "furthest": self._furthest,
            "seen": asdict(self._seen),
        }
