"""What an interrupted preparation left: which parts are finished, and for which request."""

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.prepared.manifest import MANIFEST, PROGRESS, Shard, load_manifest

LOCK = ".lock"


@dataclass
class Part:
    """A finished run of consecutive documents."""

    documents: int  # of both splits
    digest: str  # over all documents from the first one to the last of this part
    train: Shard | None
    validation: Shard | None


@dataclass
class Progress:
    request: dict[str, Any]
    tokenizer_sha256: str | None = None  # None: not there yet
    parts: list[Part] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        write_text(folder / PROGRESS, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Progress":
        content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        parts = [
            Part(**{**part, **{name: part[name] and Shard(**part[name]) for name in ("train", "validation")}})
            for part in content["parts"]
        ]
        return cls(content["request"], content["tokenizer_sha256"], parts)


def open_progress(out: Path, request: dict[str, Any]) -> Progress:
    """Return what an interrupted run left, or a fresh start; a UserError names a folder that is not ours."""
    if (out / PROGRESS).is_file():
        try:
            progress = Progress.load(out)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{out / PROGRESS} is no progress file of ours: choose another folder") from error
        if progress.parts or progress.request == request:
            refuse_other(out, progress.request, request)
            return progress
        discard(out, progress)  # begun with other arguments, and no further than the tokenizer
    progress = Progress(request)
    progress.save(out)
    return progress


def refuse_foreign(out: Path) -> None:
    """Raise a UserError for a folder with somebody else's files in it."""
    if not out.is_dir() or (out / PROGRESS).is_file():
        return
    # A `.part` can only be the progress file of a run that ended while writing it.
    if others := sorted(path.name for path in out.iterdir() if path.name not in (LOCK, PROGRESS + ".part")):
        raise UserError(f"{out} is not empty ({others[0]}) and holds no preparation: choose another folder")


def discard(out: Path, progress: Progress) -> None:
    """Remove what an unfinished preparation wrote."""
    shards = [shard.file for part in progress.parts for shard in (part.train, part.validation) if shard]
    for name in (*shards, "tokenizer.model", "tokenizer.json", "tokenizer_config.json", PROGRESS):
        (out / name).unlink(missing_ok=True)


def close_progress(out: Path) -> None:
    """Forget the progress of a finished run."""
    (out / PROGRESS).unlink()


def refuse_other(out: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise a UserError that lists the differences if `out` was begun for another request."""
    keys = sorted(key for key in there.keys() | asked.keys() if there.get(key) != asked.get(key))
    if "kind" in keys:
        keys = ["kind"]  # its own options are another's as well
    if keys:
        differences = "; ".join(
            f"{_option(key)} {_words(there.get(key))}, now asked for {_words(asked.get(key))}" for key in keys
        )
        raise UserError(f"{out} was prepared with {differences}: choose another folder, or remove that one")


def refuse_instead_of_stdlib(folder: str | Path, vocab_size: int) -> None:
    """Raise a UserError, in the configuration's words, where data=stdlib would have another preparation."""
    if not (Path(folder) / MANIFEST).is_file():
        return
    there = load_manifest(folder)
    if (kind := there.request.get("kind")) != "stdlib":
        raise UserError(
            f"data.path={folder}: holds {kind} of your own, and data=stdlib, the default, would have the "
            "standard library there; add data=local to train on what it holds"
        )
    if (pieces := there.request.get("vocab_size")) != vocab_size:
        raise UserError(
            f"data.vocab_size={vocab_size}: {folder} was prepared with {pieces}; take that, or another "
            "folder as data.path"
        )


def _option(key: str) -> str:
    """A request's key as the command line spells it."""
    words = {"kind": "source", "paths": "paths", "dataset": "dataset", "tokenizer_sha256": "--tokenizer"}
    return words.get(key, "--" + key.replace("_", "-"))


def _words(value: Any) -> str:
    if value is None:
        return "none"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else text  # a tokenizer's hash


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
