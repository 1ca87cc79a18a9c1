"""`manifest.json`, which describes a prepared folder. It is written last: its presence means "finished"."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError

FORMAT = "dsv2-prepared"
VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # exists until the manifest is written
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
    """The content of a finished folder.

    `train.unigram_nats` is the entropy of the training tokens' distribution. `validation.unigram_nats` is
    the mean loss, in nats per token, of predicting the validation tokens by that distribution (each count
    plus one). A model that knows only frequencies reaches this loss, so it is the baseline to beat.
    """

    request: dict[str, Any]  # the arguments of the preparation; the same request is not prepared again
    source: str  # one line that describes the corpus to people
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
    """Read the manifest of a prepared folder. Check that its files exist and its shards have their sizes.

    Raises:
        UserError: the folder is missing, unfinished, of another format or damaged; the message says how to
            prepare one.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    make = f"make one with: python -m dsv2 prepare files TEXTS --out {folder} (or jsonl, parquet, hub)"
    if (folder / PROGRESS).is_file():
        make = "it was interrupted: run the same command again, and it continues"
    if not path.is_file():
        problem = "holds no finished preparation" if folder.is_dir() else "does not exist"
        raise UserError(f"data.path={folder}: that folder {problem}; {make}")
    try:
        manifest = _parse(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"data.path={folder}: {MANIFEST} is not of format {FORMAT} {VERSION}; {make}"
        ) from error
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        file = folder / shard.file
        actual = file.stat().st_size if file.is_file() else None
        if actual != shard.file_bytes:
            state = "is missing" if actual is None else f"has {actual} bytes instead of {shard.file_bytes}"
            raise UserError(
                f"data.path={folder}: {file.name} {state}; remove the folder and prepare it again"
            )
    for name in (manifest.tokenizer_file, TOKEN_BYTES):
        if not (folder / name).is_file():
            raise UserError(f"data.path={folder}: {name} is missing; remove the folder and prepare it again")
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
