"""The progress file of a preparation: its request and finished parts, from which the next run continues."""

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.prepared.manifest import PROGRESS, Shard, UnknownField, known_fields
from data.reading import is_file, is_folder, names_in, read_json
from data.sealed import seal, unseal

LOCK = ".lock"
SEAL = "progress_crc32"


@dataclass
class Part:
    """A finished part of the preparation: consecutive documents."""

    documents: int  # of both splits
    digest: str  # over all documents from the first one to the last of this part
    train: Shard | None
    validation: Shard | None


@dataclass
class Progress:
    request: dict[str, Any]
    tokenizer_sha256: str | None = None  # None: not written yet
    parts: list[Part] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        content = seal(dataclasses.asdict(self), SEAL)
        write_text(folder / PROGRESS, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Progress":
        """Read the progress file. Every shard that it names is a shard of this folder.

        Raises:
            UnknownField: a field does not exist.
            ValueError: the file holds something else.
        """
        content = read_json(folder / PROGRESS)
        fields = known_fields(cls, _without_seal(content))
        progress = cls(**unseal(content, SEAL))
        progress.parts = [_part(part) for part in fields["parts"]]
        if not isinstance(progress.request, dict) or not isinstance(progress.tokenizer_sha256, str | None):
            raise ValueError("another request or tokenizer")
        return progress


def _without_seal(content: Any) -> Any:
    return {k: v for k, v in content.items() if k != SEAL} if isinstance(content, dict) else content


def _part(content: Any) -> Part:
    fields = known_fields(Part, content)
    for split in ("train", "validation"):
        fields[split] = None if fields[split] is None else Shard.of(fields[split])
    part = Part(**fields)
    if type(part.documents) is not int or part.documents < 0 or not isinstance(part.digest, str):
        raise ValueError("a part without its documents")
    return part


def open_progress(out: Path, request: dict[str, Any]) -> Progress:
    """Return the progress of an interrupted run, or that of a fresh start.

    Raises:
        UserError: the progress file is damaged, or belongs to another request.
        Unreadable: the file system refuses to read the progress file.
    """
    if is_file(out / PROGRESS):
        try:
            progress = Progress.load(out)
        except UnknownField as error:
            raise UserError(f"{out / PROGRESS} {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{out / PROGRESS} is not a progress file; choose another folder") from error
        if progress.parts or progress.request == request:
            refuse_other(out, progress.request, request)
            return progress
        discard(out, progress)  # begun with other arguments, and only the tokenizer was written
    progress = Progress(request)
    progress.save(out)
    return progress


def refuse_foreign(out: Path) -> None:
    """Raise a UserError if the folder holds files that a preparation did not write."""
    if not is_folder(out) or is_file(out / PROGRESS):
        return
    # A run that ended while it wrote its first progress leaves these two files.
    ours = (LOCK, PROGRESS + ".part")
    if foreign := [name for name in names_in(out) if name not in ours]:
        raise UserError(f"--out {out}: is not empty ({foreign[0]}) and not prepared; choose another folder")


def discard(out: Path, progress: Progress) -> None:
    """Remove the files of an unfinished preparation."""
    shards = [shard.file for part in progress.parts for shard in (part.train, part.validation) if shard]
    for name in (*shards, "tokenizer.model", "tokenizer.json", "tokenizer_config.json", PROGRESS):
        (out / name).unlink(missing_ok=True)


def close_progress(out: Path) -> None:
    """Remove the progress file of a finished run."""
    (out / PROGRESS).unlink()


def refuse_other(out: Path, previous: dict[str, Any], request: dict[str, Any]) -> None:
    """Raise a UserError that lists the differences if `out` belongs to another request."""
    keys = sorted(key for key in previous.keys() | request.keys() if previous.get(key) != request.get(key))
    if "kind" in keys:
        keys = ["kind"]  # another kind has other options as well
    if keys:
        differences = "; ".join(
            f"{_option(key)} {_words(previous.get(key))}, now {_words(request.get(key))}" for key in keys
        )
        raise UserError(f"--out {out}: was prepared with {differences}; choose another folder, or remove it")


def _option(key: str) -> str:
    """Return a request's key as the command line spells it."""
    words = {"kind": "source", "paths": "paths", "dataset": "dataset", "tokenizer_sha256": "--tokenizer"}
    return words.get(key, "--" + key.replace("_", "-"))


def _words(value: Any) -> str:
    if value is None:
        return "none"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else text  # a tokenizer's hash


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
