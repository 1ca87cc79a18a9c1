"""`manifest.json`, which describes a prepared folder. It is written last: its presence means "finished".

The manifest has its own checksum and that of every record batch of every shard. data/prepared/verify.py says
when which one is compared. Folders of earlier versions have no checksums.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from data.errors import UserError
from data.reading import is_file, is_folder, is_plain_name, read_json, size_of
from data.sealed import seal, unseal

FORMAT = "dsv2-prepared"
VERSION = 1
MANIFEST = "manifest.json"
SEAL = "manifest_crc32"
PROGRESS = "progress.json"  # exists until the manifest is written
TOKEN_BYTES = "token_bytes.npy"  # int32 [vocab_size]: UTF-8 bytes of each id
AGAIN = "remove the folder and prepare it again"
_SHARD = re.compile(r"(train|validation)-\d{5,}\.arrow")  # the names that a preparation gives


@dataclass(frozen=True)
class Shard:
    file: str
    documents: int
    tokens: int  # with each document's bos and eos
    text_bytes: int  # UTF-8
    file_bytes: int
    crc32: tuple[int, ...] = ()  # of the ids of each record batch, in order; empty in earlier versions

    @classmethod
    def of(cls, content: object) -> "Shard":
        """Return the shard for a result of `dataclasses.asdict`.

        Raises:
            UnknownField: a field does not exist.
            ValueError: a field is missing or of another kind, or the file is no shard of this folder.
        """
        fields = known_fields(cls, content)
        crc32 = fields.pop("crc32", ())
        shard = cls(**fields, crc32=tuple(crc32))
        counts = (shard.documents, shard.tokens, shard.text_bytes, shard.file_bytes, *shard.crc32)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("a shard without its counts")
        if not isinstance(shard.file, str) or not _SHARD.fullmatch(shard.file):
            raise ValueError(f"{shard.file!r} is no shard of this folder")
        return shard


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
    token_bytes_crc32: int | None = None  # of token_bytes.npy's values; None in earlier versions

    def split(self, name: str) -> Split:
        return {"train": self.train, "validation": self.validation}[name]


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a prepared folder. Check that its files exist and its shards have their sizes.

    Raises:
        UserError: the folder is missing, unfinished, of another format or damaged; the message says how to
            prepare one.
        Unreadable: the file system refuses to read the folder.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    make = f"make one with: python -m dsv2 prepare files TEXTS --out {folder} (or jsonl, parquet, hub)"
    if is_file(folder / PROGRESS):
        make = "it was interrupted: run the same command again, and it continues"
    if not is_file(path):
        problem = "holds no finished preparation" if is_folder(folder) else "does not exist"
        raise UserError(f"data.path={folder}: that folder {problem}; {make}")
    try:
        manifest = _parse(read_json(path))
    except UnknownField as error:
        raise UserError(f"data.path={folder}: {MANIFEST} {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"data.path={folder}: {MANIFEST} is not of format {FORMAT} {VERSION} ({error}); {make}"
        ) from error
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        file = folder / shard.file
        actual = size_of(file)
        if actual != shard.file_bytes:
            state = "is missing" if actual is None else f"has {actual} bytes instead of {shard.file_bytes}"
            raise UserError(f"data.path={folder}: {file.name} {state}; {AGAIN}")
    for name in (manifest.tokenizer_file, TOKEN_BYTES):
        if not is_file(folder / name):
            raise UserError(f"data.path={folder}: {name} is missing; {AGAIN}")
    return manifest


def to_json(manifest: Manifest) -> str:
    """Return the text of manifest.json."""
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    return json.dumps(seal(content, SEAL), indent=1) + "\n"


class UnknownField(ValueError):
    """A newer version has written this file."""


def known_fields(cls: type, content: object) -> dict[str, Any]:
    """Return the fields of a dataclass that a file gives.

    Raises:
        UnknownField: a field does not exist.
        ValueError: the content is no JSON object.
    """
    if not isinstance(content, dict):
        raise ValueError("no object")
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(content.keys() - names):
        raise UnknownField(f"has the unknown field {unknown[0]!r}; use a newer dsv2")
    return dict(content)


def _parse(content: Any) -> Manifest:
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise ValueError("another format or version")
    header = ("format", "version", SEAL)
    fields = known_fields(Manifest, {name: value for name, value in content.items() if name not in header})
    unseal(content, SEAL)
    for name in ("train", "validation"):
        split = known_fields(Split, fields[name])
        split["shards"] = tuple(Shard.of(shard) for shard in split["shards"])
        fields[name] = Split(**split)
    fields["skipped_examples"] = tuple(fields["skipped_examples"])
    manifest = Manifest(**fields)
    for name, kind in get_type_hints(Manifest).items():
        value = getattr(manifest, name)
        if kind in (int, str) and type(value) is not kind:
            raise ValueError(f"{name} is {value!r}")
    if not isinstance(manifest.request, dict):
        raise ValueError(f"request is {manifest.request!r}")
    if not is_plain_name(manifest.tokenizer_file):
        raise ValueError(f"{manifest.tokenizer_file!r} is no file of this folder")
    return manifest
