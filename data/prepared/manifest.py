"""What a prepared folder holds: `manifest.json`, written last, so that its presence means "finished"."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError

FORMAT = "dsv2-prepared"
VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # there in place of it until all is done
TOKEN_BYTES = "token_bytes.npy"  # int32 [vocab_size]: UTF-8 bytes of each id


@dataclass(frozen=True)
class Shard:
    file: str
    documents: int
    tokens: int  # with each document's bos and eos
    text_bytes: int  # UTF-8
    file_bytes: int


@dataclass(frozen=True)
class Split:
    shards: tuple[Shard, ...]
    unigram_nats: float | None  # see Manifest; None for a split without documents

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """A finished folder.

    `train.unigram_nats` is the entropy of the training tokens' distribution; `validation.unigram_nats`
    the mean nats a token of predicting the validation tokens by that distribution (each count plus
    one): what a model that only knows frequencies reaches, so the baseline to beat.
    """

    request: dict[str, Any]  # what was asked for; the same request finds the folder finished
    source: str  # a line for people
    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    dtype: str  # of the ids: uint16 or uint32
    train: Split
    validation: Split
    skipped: int  # documents that could not be read
    skipped_examples: tuple[str, ...]
    fingerprint: str  # sha256 over every document, the tokenizer and the split: equal data, equal text

    def split(self, name: str) -> Split:
        return {"train": self.train, "validation": self.validation}[name]


def load_manifest(folder: str | Path) -> Manifest:
    """Read and check a prepared folder: all shards are there, with the sizes they were written with.

    UserError: no folder, not finished, not one of ours, or damaged; it names the command that makes one.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    make = f"make one with: python -m data.prepare files TEXTS --out {folder} (or jsonl, parquet, hub)"
    if (folder / PROGRESS).is_file():
        make = "it was interrupted: run the command that began it again, and it continues"
    if not path.is_file():
        there = "holds no finished preparation" if folder.is_dir() else "does not exist"
        raise UserError(f"data.path={folder}: that folder {there}; {make}")
    try:
        manifest = _parse(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"data: {path} is not a manifest of format {FORMAT} {VERSION}; {make}") from error
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        name, size = shard.file, shard.file_bytes
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes in place of {size}"
            raise UserError(f"data: {folder / name} {state}; remove {folder} and prepare it again")
    for name in (manifest.tokenizer_file, TOKEN_BYTES):
        if not (folder / name).is_file():
            raise UserError(f"data: {folder / name} is missing; remove {folder} and prepare it again")
    return manifest


def to_json(manifest: Manifest) -> str:
    """Return the text of manifest.json."""
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    return json.dumps(content, indent=1) + "\n"


def _parse(content: dict[str, Any]) -> Manifest:
    if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
        raise ValueError("another format")
    for name in ("train", "validation"):
        split = content[name]
        split["shards"] = tuple(Shard(**shard) for shard in split["shards"])
        content[name] = Split(**split)
    content["skipped_examples"] = tuple(content["skipped_examples"])
    return Manifest(**content)


def summary(out: str | Path, manifest: Manifest) -> str:
    """Return what was prepared, a line a split."""
    lines = [f"{out}: {manifest.source}, {manifest.vocab_size} pieces"]
    if manifest.skipped:
        names = ", ".join(manifest.skipped_examples[:5]) + (", ..." if manifest.skipped > 5 else "")
        lines.append(f"skipped: {manifest.skipped} documents that are not text ({names})")
    for name in ("train", "validation"):
        split = manifest.split(name)
        if split.unigram_nats is not None:
            per_token = split.text_bytes / split.tokens
            lines.append(
                f"{name}: {split.documents} documents, {split.tokens} tokens, {per_token:.2f} bytes a token; "
                f"by frequencies alone {split.unigram_nats:.3f} nats a token, "
                f"{split.unigram_nats / math.log(2) / per_token:.3f} bits a byte"
            )
    return "\n".join(lines)
