"""What a checkpoint holds besides tensors, and the results of finding and of loading a checkpoint."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from dsv2.errors import UserError


@dataclass(frozen=True)
class RunState:
    """Everything except tensors that a run needs to continue."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens seen
    data: dict[str, Any] | None = None  # the stream's state
    wandb_id: str | None = None

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
            or not isinstance(state.wandb_id, str | None)
        ):
            raise UserError(f"has run={content!r}; use an older checkpoint")
        return state

    def after(self, step: int, tokens: int) -> "RunState":
        """Return the state after `step` steps and `tokens` tokens in all."""
        return replace(self, step=step, tokens=tokens)


class Found(NamedTuple):
    """A checkpoint to continue from."""

    path: Path
    state: RunState  # of this run: step 0 at the start of a new stage
    warnings: list[str]  # about damaged checkpoints that were passed over
    older: list[Path]  # older checkpoints of this run, newest first, to fall back on


class Loaded(NamedTuple):
    """A checkpoint whose tensors have been loaded."""

    state: RunState
    path: Path
    warnings: list[str]  # about damaged checkpoints that were passed over or set aside
    changed: list[str]  # options whose values differ from the saved ones
    optimizer_steps: float  # the optimizer's own count
