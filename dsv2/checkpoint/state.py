"""What a checkpoint holds, and the results of saving, finding and loading one."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from dsv2.optimizers.base import Shard

from dsv2.errors import UserError


@dataclass(frozen=True)
class RunState:
    """Everything except tensors that a run needs to continue."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens seen
    data: dict[str, Any] | None = None  # the stream's state
    wandb_id: str | None = None
    tokenizer: dict[str, str] | None = None  # `Tokenizer.record`; None in checkpoints of earlier versions
    spikes: dict[str, Any] | None = None  # the spike guard's state; None with spike.policy=off

    @classmethod
    def of(cls, content: dict[str, Any]) -> "RunState":
        """Return the state for a result of `dataclasses.asdict`. A field that it lacks gets its default.

        Raises:
            UserError: a field does not exist, or has another type.
        """
        if unknown := sorted(content.keys() - {field.name for field in fields(cls)}):
            raise UserError(f"has the unknown field 'run.{unknown[0]}'; use a newer dsv2")
        state = cls(**content)
        counts = all(type(n) is int and n >= 0 for n in (state.step, state.tokens))
        if (
            not counts
            or not isinstance(state.data, dict | None)
            or not isinstance(state.spikes, dict | None)
            or not isinstance(state.wandb_id, str | None)
            or not _is_record(state.tokenizer)
        ):
            raise UserError(f"has run={content!r}; use an older checkpoint")
        return state

    def after(self, step: int, tokens: int) -> "RunState":
        """Return the state after `step` steps and `tokens` tokens in all."""
        return replace(self, step=step, tokens=tokens)


def _is_record(tokenizer: Any) -> bool:
    """Return whether the value is a result of `Tokenizer.record`, or None."""
    names = {"file", "pieces_sha256"}
    return tokenizer is None or (
        isinstance(tokenizer, dict)
        and tokenizer.keys() == names
        and all(isinstance(text, str) for text in tokenizer.values())
    )


class Snapshot(NamedTuple):
    """What one rank contributes to a checkpoint."""

    shards: "list[Shard]"  # its weights, optimizer states and buffers
    state: RunState
    optimizer_steps: float  # the optimizer's own count
    rng: "Tensor"  # the host's random state, uint8


class Saved(NamedTuple):
    """How one save went."""

    step: int
    stopped_s: float  # seconds for which training stopped when the save began
    seconds: float  # from its beginning until the checkpoint was complete
    problem: str | None = None  # why there is no checkpoint
    waited_s: float = 0.0  # seconds for which the next save waited for this one


class Found(NamedTuple):
    """A checkpoint to continue from."""

    path: Path
    state: RunState  # of this run: step 0 at the start of a new stage
    warnings: list[str]  # about damaged checkpoints that were passed over
    older: list[Path]  # older checkpoints of this run, newest first, to fall back on
    content: dict[str, Any]  # of its state.json


class Loaded(NamedTuple):
    """A checkpoint whose tensors have been loaded."""

    state: RunState
    path: Path
    warnings: list[str]  # about damaged checkpoints that were passed over or set aside
    changed: list[str]  # options whose values differ from the saved ones
    optimizer_steps: float  # the optimizer's own count
