"""Find the checkpoint that a run begins at, and refuse one that does not fit. Imports no torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv2.checkpoint.files import check, find_checkpoint, newest_first
from dsv2.checkpoint.state import Found, RunState
from dsv2.config.compose import check_saved, to_plain
from dsv2.config.schema import Config
from dsv2.errors import UserError


class CheckpointFinder:
    """A run's checkpoints, as far as their state.json tells.

    Args:
        folder: where the checkpoints are.
        settings: the run's whole configuration as plain values. Its model is compared with a checkpoint's.
            With `new_stage`, another run's checkpoint gives weights and states only.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings

    def find(self, resume: str, stop_step: int | None = None) -> Found | None:
        """Return the checkpoint that `resume` means, or None for a fresh start.

        Args:
            resume: `auto`, the newest whole checkpoint of this run; `never`; or a path. A path names a
                checkpoint, or a run's folder for its newest one. If this run already has checkpoints, a path
                to another run's is ignored.
            stop_step: the run is to stop after this step.

        Raises:
            Unreadable: the file system refuses to read the folder or a checkpoint. Nothing older is used,
                because the run would later write over what it could not read.
            UserError: the path has no whole checkpoint, or names one of this run that is not its newest.
                `never` was given although the run has checkpoints. The run has checkpoints, but none is
                whole. The checkpoint is another model's, or has reached `stop_step`.
        """
        found = self._find(resume)
        if found and stop_step is not None and found.state.step >= stop_step:
            raise UserError(
                f"stop_step={stop_step}: must be after step {found.state.step}, which {found.path} has "
                "reached; or null to run to the end"
            )
        return found

    def _find(self, resume: str) -> Found | None:
        present = newest_first(self.folder)
        if resume == "never":
            if present:
                raise UserError(
                    f"resume=never: {self.folder} already holds {present[0].name}; use resume=auto to "
                    "continue that run, or another name=NAME to start afresh beside it"
                )
            return None
        if resume != "auto":
            chosen = find_checkpoint(Path(resume), option=f"resume={resume}")
            content = check(chosen)
            is_own = self._is_own(chosen)
            if is_own and chosen.name != present[0].name:
                raise UserError(
                    f"resume={resume}: this run has the newer {present[0].name}, which would be overwritten; "
                    "use another name=NAME to branch off"
                )
            if is_own or not present:
                return self._found(chosen, content, [], [])
        warnings = []
        for index, path in enumerate(present):
            try:
                content = check(path)
            except UserError as error:
                warnings.append(str(error))
                continue
            return self._found(path, content, warnings, present[index + 1 :])
        if present:
            raise UserError(
                f"resume={resume}: no checkpoint in {self.folder} is whole ({warnings[0]}); move the folder "
                "away to start afresh"
            )
        return None

    def _is_own(self, path: Path) -> bool:
        return path.resolve().parent == self.folder.resolve()

    def _begins_stage(self, path: Path) -> bool:
        return bool(self.settings.get("new_stage")) and not self._is_own(path)

    def state_of(self, path: Path, content: dict[str, Any]) -> RunState:
        """Return the state to begin with at a checkpoint, given its state.json."""
        state = RunState() if self._begins_stage(path) else RunState.of(content["run"])
        return state if self._is_own(path) else replace(state, wandb_id=None)

    def _found(self, path: Path, content: dict[str, Any], warnings: list[str], older: list[Path]) -> Found:
        """Refuse a checkpoint of another model.

        The balance recipe and the longest length may change, and RoPE's scaling at the start of a new stage.
        """
        stage = self._begins_stage(path)
        may_change = {"balance", "max_position_embeddings"} | ({"rope_scaling"} if stage else set())
        check_saved(content["config"], f"the configuration of checkpoint {path}")
        # A checkpoint of an older version has fewer fields: the defaults stand for the missing ones.
        saved = to_plain(Config())["model"] | content["config"]["model"]
        for key, value in self.settings["model"].items():
            if key not in may_change and saved.get(key) != value:
                raise UserError(
                    f"model.{key}={value}: the checkpoint {path} was saved with {saved.get(key)}; "
                    "use that, or start another run with name=NAME"
                    + (", from its weights with new_stage=true" if key == "rope_scaling" else "")
                )
        return Found(path, self.state_of(path, content), warnings, older, content)
