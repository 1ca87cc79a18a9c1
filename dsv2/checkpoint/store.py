"""Checkpoints: one format for every layout, complete or absent.

A checkpoint is a folder `step-00000120` with torch.distributed.checkpoint files and `state.json`. For
every parameter it holds the fp32 weights and Adam's two moments as flat tensors of the WHOLE
parameter; each rank writes and reads the contiguous ranges it owns (`Fragment`), so world size,
expert-parallel size and ZeRO stage may change between save and load.

It is written to `step-00000120.partial` and renamed at the end, after `state.json` (see
dsv2/checkpoint/files.py): a checkpoint that was cut short is never taken for a whole one.

Nothing here imports DeepSpeed, which takes seconds: who only reads checkpoints does not need it.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dsv2.checkpoint.files import (
    FORMAT,
    STATE_FILE,
    check,
    checksum,
    complete_checkpoints,
    damaged_file,
    find_checkpoint,
    newest_first,
    sync_folder,
)
from dsv2.config.compose import differences, to_plain
from dsv2.config.schema import Config
from dsv2.errors import CheckpointError, UserError
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim

if TYPE_CHECKING:
    from dsv2.parallel.zero.base import Fragment
    from dsv2.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class RunState:
    """Everything but tensors that a run needs to go on."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens seen
    data: dict[str, Any] | None = None  # the stream's state
    wandb_id: str | None = None


class Found(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    state: RunState  # of this run, so at step 0 where a stage begins
    warnings: list[str]  # about damaged ones that were passed over
    older: list[Path]  # the run's own, newest first, to fall back on
    changed: list[str]  # once it is loaded: options that are not those it was saved with


class _Range:
    """A rank's range of a flat tensor, as torch.distributed.checkpoint's planners want it."""

    def __init__(self, local: Tensor, offset: int, total: int):
        self.local, self.offset, self.total = local, torch.Size([offset]), torch.Size([total])

    def size(self) -> torch.Size:
        return self.total

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self.offset, self.local.size())]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        data = TensorWriteData(
            chunk=self.__create_chunk_list__()[0],
            properties=TensorProperties.create_from_tensor(self.local),
            size=self.total,
        )
        return [WriteItem(MetadataIndex(name, self.offset), WriteItemType.SHARD, tensor_data=data)]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].local


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default one walks through the dict and replaces what is not a tensor by None.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


def _moment(optimizer: torch.optim.Optimizer, fragment: "Fragment", key: str) -> Tensor:
    state = optimizer.state[fragment.owner]
    if key not in state:  # before the first step Adam has no moments yet
        state[key] = torch.zeros_like(fragment.owner.detach())
    return state[key]


def _ranges(engine: "Engine") -> dict[str, _Range]:
    """What this rank owns, as views: writing to them loads a checkpoint."""
    ranges = {}
    for fragment in engine.fragments():
        tensors = {"fp32": fragment.owner}
        tensors |= {key: _moment(engine.optimizer, fragment, key) for key in MOMENTS}
        for key, tensor in tensors.items():
            name = f"{key}/{fragment.name}"
            ranges[name] = _Range(fragment.view(tensor), fragment.offset, fragment.total)
    return ranges


class CheckpointStore:
    """A run's checkpoints.

    Args:
        folder: where they lie.
        keep: newest complete checkpoints that stay when another is saved.
        settings: the run's whole configuration, plain; saved along, and its model's sizes compared.
            With its `new_stage`, another run's checkpoint gives weights and moments only.
    """

    def __init__(self, folder: Path, keep: int, settings: dict[str, Any]):
        self.folder, self.keep, self.settings = folder, keep, settings

    def save(self, engine: "Engine", state: RunState) -> Path:
        """Write `folder/step-N` and delete all but the newest `keep` complete checkpoints. Collective.

        Raises:
            CheckpointError: on every rank, if any rank could not write; nothing of the attempt is left.
        """
        target = self.folder / f"step-{state.step:08d}"
        partial = target.with_suffix(".partial")
        mesh = engine.mesh
        everyone = mesh[Dim.world]
        rng = everyone.objects(torch.get_rng_state())

        def prepare() -> None:
            for leftover in self.folder.glob("step-*.partial"):  # of a save that was cut short
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)

        def complete() -> None:
            with open(partial / "rng.pt", "wb") as file:
                torch.save(rng, file)
                file.flush()
                os.fsync(file.fileno())
            _write_state(partial, state, self.settings, checksums, engine)
            shutil.rmtree(target, ignore_errors=True)  # an older try at the same step
            os.rename(partial, target)
            sync_folder(self.folder)

        try:
            _on_main(prepare, mesh)
            _write_ranges(engine, partial)
            # Each rank reads back what it has just written.
            written = {file.name: checksum(file) for file in partial.glob(f"__{everyone.rank}_*.distcp")}
            checksums = {k: v for part in everyone.objects(written) for k, v in part.items()}
            _on_main(complete, mesh)
        except CheckpointError as error:
            if mesh.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"checkpoint {target} could not be written: {error}") from None
        if mesh.is_main:
            older = [path for path in complete_checkpoints(self.folder) if path != target]
            for path in older[self.keep - 1 :]:
                shutil.rmtree(path, ignore_errors=True)
        return target

    def find(self, resume: str, stop_step: int | None = None) -> Found | None:
        """The checkpoint that `resume` means, or None for a fresh start.

        Args:
            resume: `auto`, the newest whole one of this run; `never`; or the path of one, or of a run's
                folder for its newest, from which the run starts, unless it already has its own to go on from.
            stop_step: the run is to stop after this step.

        Raises:
            UserError: the path has no whole checkpoint or is an older one of this very run; `never` with any
                there to lose; some are there, none is whole; another model's; past `stop_step` already.
        """
        found = self._find(resume)
        if found and stop_step is not None and found.state.step >= stop_step:
            raise UserError(
                f"stop_step={stop_step}: {found.path} is at step {found.state.step} already; give a later "
                "step, or null to run to the end"
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
            try:
                content = check(given := find_checkpoint(Path(resume)))
            except UserError as error:
                text = str(error).removeprefix(f"checkpoint {resume}: ")
                raise UserError(f"resume={resume}: {text}") from None
            is_own = self._is_own(given)
            if is_own and given.name != present[0].name:
                raise UserError(
                    f"resume={resume}: this run has the newer {present[0].name}, which would be overwritten; "
                    "use another name=NAME to branch off"
                )
            if is_own or not present:
                return self._found(given, content, [], [])
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

    def _state(self, path: Path, content: dict[str, Any]) -> RunState:
        state = RunState() if self._begins_stage(path) else RunState(**content["run"])
        return state if self._is_own(path) else replace(state, wandb_id=None)

    def _found(self, path: Path, content: dict[str, Any], warnings: list[str], older: list[Path]) -> Found:
        """Refuse a checkpoint of another model. The balance recipe and the longest length may change; RoPE's
        scaling at the start of a new stage."""
        stage = self._begins_stage(path)
        may_change = {"balance", "max_position_embeddings"} | ({"rope_scaling"} if stage else set())
        saved = to_plain(Config())["model"] | content["config"]["model"]  # older ones have fewer fields
        for key, value in self.settings["model"].items():
            if key not in may_change and saved.get(key) != value:
                raise UserError(
                    f"model.{key}={value}: the checkpoint {path} was saved with {saved.get(key)}; "
                    "use that, or start another run with name=NAME"
                    + (", from its weights with new_stage=true" if key == "rope_scaling" else "")
                )
        return Found(path, self._state(path, content), warnings, older, [])

    def load(self, engine: "Engine", found: Found) -> RunState:
        """Load weights, optimizer and random state into a new engine of any layout. Collective.

        A damaged one is set aside as `step-N.damaged`, with a warning in `found`, and the next older one
        taken, if the run's newest was asked for. From a checkpoint of another run, this run starts with a
        W&B run of its own, and in a new stage with no steps, tokens and data behind it.

        Raises:
            UserError: damaged, and there is no other.
        """
        path, older = found.path, list(found.older)
        while problem := self._damage(path, engine.mesh):
            if not older:
                raise UserError(problem)
            if engine.mesh.is_main:
                path.rename(path.with_suffix(".damaged"))
            found.warnings.append(f"{problem}; set aside as {path.name}.damaged")
            path = older.pop(0)
        return self._load(engine, path, found.changed)

    def _damage(self, path: Path, mesh: Mesh) -> str | None:
        """What is wrong with a checkpoint's bytes; ranks share the reading. Collective."""
        problem = None
        everyone = mesh[Dim.world]
        try:
            content = check(path)
            names = sorted(content["files"])[everyone.rank :: everyone.size]
            if found := damaged_file(path, names, content.get("crc32", {})):
                problem = f"checkpoint {path}: {found}; use an older one"
        except UserError as error:
            problem = str(error)
        return next(filter(None, everyone.objects(problem)), None)

    def _load(self, engine: "Engine", path: Path, changed: list[str]) -> RunState:
        content = check(path)
        everyone = engine.mesh[Dim.world]
        if len(set(everyone.objects(json.dumps(content)))) > 1:
            raise UserError(f"checkpoint {path}: not the same on every machine; runs_dir must be shared")
        try:
            dcp.load(
                _ranges(engine),
                storage_reader=dcp.FileSystemReader(path),
                planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=engine.mesh[Dim.world].host_group,
            )
        except dcp.api.CheckpointException as error:
            raise UserError(
                f"checkpoint {path}: cannot be read ({_root_cause(error)}); use an older one"
            ) from error
        engine.set_optimizer_steps(content["adam_step"])
        engine.refresh_weights()
        rng = torch.load(path / "rng.pt", weights_only=True)  # the host's: nothing draws on a GPU after init
        if len(rng) == everyone.size:
            torch.set_rng_state(rng[everyone.rank])
        changed += differences(content["config"], self.settings)
        return self._state(path, content)


def _write_ranges(engine: "Engine", partial: Path) -> None:
    try:
        dcp.save(
            _ranges(engine),
            storage_writer=dcp.FileSystemWriter(partial),
            planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=engine.mesh[Dim.world].host_group,
        )
    except dcp.api.CheckpointException as error:  # raised on every rank
        raise CheckpointError(_root_cause(error)) from error
    if not all(engine.mesh[Dim.world].objects((partial / ".metadata").exists())):
        raise CheckpointError(f"not every machine sees {partial}; runs_dir must be a shared file system")


def _on_main(action: Callable[[], None], mesh: Mesh) -> None:
    """Run it on rank 0 and let every rank know whether it worked."""
    problem = None
    if mesh.is_main:
        try:
            action()
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            problem = _in_words(error)
    if problem := mesh[Dim.world].objects(problem)[0]:
        raise CheckpointError(problem)


def _root_cause(error: dcp.api.CheckpointException) -> str:
    """The first rank's own words, out of DCP's collection of every rank's exceptions."""
    failures = list(error.failures.values())
    return _in_words(failures[0][0] if failures else error)


def _in_words(error: BaseException) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    # What torch's writer of zip files says when a write came up short.
    return f"the disk is full, it seems ({text})" if "inline_container" in text else text


def _write_state(
    partial: Path,
    state: RunState,
    config: dict[str, Any],
    checksums: dict[str, int],
    engine: "Engine",
) -> None:
    """state.json; `checksums` has those of the ranks' files, the others are made here."""
    others = {path.name: checksum(path) for path in partial.iterdir() if path.name not in checksums}
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    steps = [float(s["step"]) for s in engine.optimizer.state.values() if "step" in s]
    content = {
        "format": FORMAT,
        "run": asdict(state),
        "adam_step": max(steps, default=0.0),
        "config": config,
        "files": sizes,
        "crc32": checksums | others,
    }
    with open(partial / STATE_FILE, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
