"""Save, find and load checkpoints. One format serves every layout; a checkpoint is complete or absent.

A checkpoint is a folder `step-00000120` with torch.distributed.checkpoint files and `state.json`. It holds
the master weights and the optimizer's states of every parameter, as flat tensors of the WHOLE parameter, and
every persistent buffer. Each tensor has the precision in which the run keeps it; `load` converts it to the
precision of the new run. Each rank writes and reads the contiguous ranges it owns (`Shard`), so world size,
expert-parallel size and ZeRO stage may change between save and load.

The folder is named `step-00000120.partial` while it is written. It is renamed last, after `state.json` has
been written (see dsv2/checkpoint/files.py), so an interrupted checkpoint never looks like a whole one.

Nothing here imports DeepSpeed: the import takes seconds, and reading a checkpoint does not need it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from data.errors import first_line
from dsv2.checkpoint import tensors
from dsv2.checkpoint.files import (
    FORMAT,
    STATE_FILE,
    check,
    checksum,
    complete_checkpoints,
    damaged_file,
    free_name,
    state_text,
    step_of,
    sync_folder,
)
from dsv2.checkpoint.find import CheckpointFinder
from dsv2.checkpoint.state import Found, Loaded, Snapshot
from dsv2.config.changes import differences
from dsv2.errors import CheckpointError, Unreadable, UserError
from dsv2.optimizers.base import Shard
from dsv2.parallel.mesh import Mesh, MeshDim
from dsv2.parallel.plan import Dim

FULL = 1 << 20  # bytes: a file system with less free space than this counts as full


class CheckpointStore(CheckpointFinder):
    """A run's checkpoints, to be found, saved and loaded.

    Args:
        folder: see `CheckpointFinder`.
        keep: how many complete checkpoints remain after a save, the new one included.
        keep_every: checkpoints of steps that this number divides remain as well; 0: none.
        settings: see `CheckpointFinder`. Each checkpoint holds them.
    """

    def __init__(self, folder: Path, keep: int, settings: dict[str, Any], *, keep_every: int = 0):
        super().__init__(folder, settings)
        self.keep = keep
        self.keep_every = keep_every

    def save(self, snapshot: Snapshot, everyone: MeshDim) -> Path:
        """Write `folder/step-N` and delete the checkpoints that need not be kept. Collective.

        Args:
            snapshot: this rank's part of the checkpoint.
            everyone: all ranks; `Mesh.background` if training continues meanwhile.

        Raises:
            CheckpointError: on every rank, if any rank could not write; the partial checkpoint is removed.
        """
        target = self.folder / f"step-{snapshot.state.step:08d}"
        partial = target.with_suffix(".partial")
        rng = everyone.objects(snapshot.rng)

        content = {
            "format": FORMAT,
            "run": asdict(snapshot.state),
            "adam_step": snapshot.optimizer_steps,
            "config": self.settings,
        }

        def prepare() -> None:
            for leftover in self.folder.glob("step-*.partial"):  # of a save that was interrupted
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)

        def complete() -> None:
            with open(partial / "rng.pt", "wb") as file:
                torch.save(rng, file)
                file.flush()
                os.fsync(file.fileno())
            _write_state(partial, content, checksums)
            shutil.rmtree(target, ignore_errors=True)  # an earlier checkpoint of the same step
            os.rename(partial, target)
            sync_folder(self.folder)

        try:
            _on_main(prepare, everyone)
            _write_shards(snapshot.shards, partial, everyone)
            # Each rank reads back the files that it has just written.
            written = {file.name: checksum(file) for file in partial.glob(f"__{everyone.rank}_*.distcp")}
            checksums = {k: v for part in everyone.objects(written) for k, v in part.items()}
            _on_main(complete, everyone)
        except CheckpointError as error:
            # torch's writer of zip files does not say why a write came up short.
            is_full = any(everyone.objects(_is_disk_full(self.folder)))
            reason = f"the disk is full ({error})" if is_full else error
            if everyone.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"checkpoint {target} could not be written: {reason}") from None
        if everyone.rank == 0:
            try:
                older = [path for path in complete_checkpoints(self.folder) if path != target]
            except Unreadable:  # nothing is deleted before the folder can be read again
                older = []
            for path in older[self.keep - 1 :]:
                if not self._is_kept_for_good(path):
                    shutil.rmtree(path, ignore_errors=True)
        return target

    def _is_kept_for_good(self, path: Path) -> bool:
        return self.keep_every > 0 and step_of(path) % self.keep_every == 0

    def load(self, found: Found, shards: Iterable[Shard], mesh: Mesh) -> Loaded:
        """Fill the shards of a new engine of any layout, and set this rank's random state. Collective.

        If the run's newest checkpoint was asked for and is damaged, it is set aside as `step-N.damaged`, and
        the next older one is loaded. After another run's checkpoint, this run has its own W&B run. In a new
        stage it also starts at step 0, with no tokens seen and at the start of its data.

        Raises:
            UserError: the checkpoint is damaged, and there is no older one.
            Unreadable: the file system refuses to read the checkpoint, which may be intact.
        """
        path = found.path
        older = list(found.older)
        warnings = list(found.warnings)
        while True:
            # Before `_damage` gathers, and so before rank 0 renames: every rank finds the same name.
            aside = free_name(path.with_suffix(".damaged"))
            problem = self._damage(path, mesh)
            if problem is None:
                break
            if not older or isinstance(problem, Unreadable):
                raise problem
            if mesh.is_main:
                path.rename(aside)
            warnings.append(f"{problem}; set aside as {aside.name}")
            path = older.pop(0)
        content = self._read(path, shards, mesh)
        return Loaded(
            state=self.state_of(path, content),
            path=path,
            warnings=warnings,
            changed=differences(content["config"], self.settings),
            optimizer_steps=content["adam_step"],
        )

    def _damage(self, path: Path, mesh: Mesh) -> UserError | Unreadable | None:
        """Return why a checkpoint cannot be loaded, or None. The ranks share the reading. Collective."""
        problem = None
        everyone = mesh[Dim.world]
        try:
            content = check(path)
            names = sorted(content["files"])[everyone.rank :: everyone.size]
            if found := damaged_file(path, names, content.get("crc32", {})):
                problem = UserError(f"checkpoint {path}: {found}; use an older one")
        except (UserError, Unreadable) as error:
            problem = error
        return next(filter(None, everyone.objects(problem)), None)

    def _read(self, path: Path, shards: Iterable[Shard], mesh: Mesh) -> dict[str, Any]:
        everyone = mesh[Dim.world]
        try:
            content = check(path)
            text = json.dumps(content)
        except (UserError, Unreadable) as error:
            content = {}
            text = error
        texts = everyone.objects(text)
        for error in (text for text in texts if not isinstance(text, str)):
            raise error
        if len(set(texts)) > 1:
            raise UserError(
                f"checkpoint {path}: differs between machines; runs_dir must be on a shared file system"
            )
        try:
            tensors.read(shards, path, everyone.host_group)
        except CheckpointException as error:
            raise UserError(
                f"checkpoint {path}: cannot be read ({_root_cause(error)}); use an older one"
            ) from error
        try:
            # The host's: nothing draws on a GPU after init.
            rng = torch.load(path / "rng.pt", weights_only=True)
            if len(rng) == everyone.size:
                torch.set_rng_state(rng[everyone.rank])
        except Exception as error:  # whatever strange bytes may raise
            reason = first_line(error)
            raise UserError(
                f"checkpoint {path}: rng.pt cannot be read ({reason}); use an older one"
            ) from None
        return content


def _write_shards(shards: Iterable[Shard], partial: Path, everyone: MeshDim) -> None:
    try:
        tensors.write(shards, partial, everyone.host_group)
    except CheckpointException as error:  # raised on every rank
        raise CheckpointError(_root_cause(error)) from error
    if not all(everyone.objects((partial / ".metadata").exists())):
        raise CheckpointError(f"not every machine sees {partial}; runs_dir must be on a shared file system")


def _on_main(action: Callable[[], None], everyone: MeshDim) -> None:
    """Run the action on rank 0, and raise on every rank if it failed. Collective."""
    problem = None
    if everyone.rank == 0:
        try:
            action()
        except Exception as error:  # of any kind: the other ranks are waiting for the outcome
            problem = first_line(error)
    if problem := everyone.objects(problem)[0]:
        raise CheckpointError(problem)


def _root_cause(error: CheckpointException) -> str:
    """Return the message of the first rank that failed, from the exceptions of all ranks."""
    failures = list(error.failures.values())
    return first_line(failures[0][0] if failures else error)


def _is_disk_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < FULL
    except OSError:  # the folder could not be made
        return False


def _write_state(partial: Path, content: dict[str, Any], checksums: dict[str, int]) -> None:
    """Write state.json. `checksums` covers the files that the ranks wrote; this adds the remaining files."""
    remaining = {path.name: checksum(path) for path in partial.iterdir() if path.name not in checksums}
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    with open(partial / STATE_FILE, "w", encoding="utf-8") as file:
        file.write(state_text(content | {"files": sizes, "crc32": checksums | remaining}))
        file.flush()
        os.fsync(file.fileno())
