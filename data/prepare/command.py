"""Text to a prepared folder: tokenizer, Arrow shards, token_bytes.npy and, last of all, manifest.json.

    python -m data.prepare stdlib
    python -m data.prepare files corpus/ notes.txt --out prepared/corpus --vocab-size 8192
    python -m data.prepare jsonl 'dump/*.jsonl' --text-key body --tokenizer tokenizer.json --out prepared/dump

Work is cut into parts of consecutive documents; a part is one train and one validation shard. A
progress file remembers the finished parts and a digest of the documents in them, so a run that was
interrupted continues behind them, and ends with the same bytes as one that was not.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.corpora.base import FilesSource, HubSource, JsonlSource, ParquetSource, Source, StdlibSource
from data.errors import UserError
from data.prepare.progress import (
    LOCK,
    Part,
    Progress,
    close_progress,
    discard,
    open_progress,
    refuse_foreign,
    refuse_other,
    write_text,
)
from data.prepared.manifest import MANIFEST, TOKEN_BYTES, Manifest, Split, load_manifest, summary, to_json
from data.prepared.shards import ShardWriter, count_tokens, unigram_nats
from data.tokenizers.base import Tokenizer, load_tokenizer, train_tokenizer

SAMPLE_BYTES = 32 << 20  # the tokenizer is trained on the first training documents up to this many bytes
CHUNK_BYTES = 1 << 20  # text tokenised at once: one record batch a split
MOST_THREADS = 16


@dataclass(frozen=True)
class Settings:
    """How a corpus is prepared, whatever its source; exactly one of the first two is given."""

    vocab_size: int | None = None  # pieces of a new tokenizer
    tokenizer: str | None = None  # or a file with one
    val_fraction: float = 0.05  # share of the documents held out, by a hash of their text
    shard_mb: float = 32  # MiB of text a part

    def check(self) -> None:
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise UserError("give either --vocab-size (train a tokenizer) or --tokenizer (use that one)")
        if self.vocab_size is not None and self.vocab_size < 260:  # 256 bytes, unk, bos, eos, newline
            raise UserError(f"--vocab-size {self.vocab_size} must be at least 260, and characters need more")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction} must be at least 0 and below 1")
        if self.shard_mb <= 0:
            raise UserError(f"--shard-mb {self.shard_mb} must be positive")

    def request(self) -> dict[str, Any]:
        request = dataclasses.asdict(self)
        tokenizer = request.pop("tokenizer")  # a file counts by what it holds, not by where it lies
        return {**request, "tokenizer_sha256": tokenizer and load_tokenizer(tokenizer).sha256}


def prepare_stdlib(path: str | Path, vocab_size: int, quiet: bool = False) -> Manifest:
    """Prepare the standard library in `path`; every local rank may call this, and one does the work."""
    return prepare(StdlibSource(), path, Settings(vocab_size=vocab_size), quiet)


def prepare(source: Source, out: str | Path, settings: Settings, quiet: bool = False) -> Manifest:
    """Prepare `source` in the folder `out`, or return at once if that is done already.

    UserError: bad settings, no text, unreadable documents, or an `out` that cannot be written or holds
    something else.
    """
    from filelock import FileLock

    settings.check()
    out = Path(out)
    request = {**source.request(), **settings.request()}
    if finished := _finished(out, request):
        return finished
    if next(source.documents([]), None) is None:
        raise UserError(f"there is no text in {source.description()}")
    refuse_foreign(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK).acquire()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    with lock:
        if finished := _finished(out, request):  # by the process that held the lock
            return finished
        progress = open_progress(out, request)
        tokenizer = _make_tokenizer(source, out, settings, progress, quiet)
        skipped: list[str] = []
        digest = _write_parts(source, out, settings, progress, tokenizer, skipped, quiet)
        return _finish(source, out, settings, progress, tokenizer, skipped, digest)


def _finished(out: Path, request: dict[str, Any]) -> Manifest | None:
    if not (out / MANIFEST).is_file():
        return None
    manifest = load_manifest(out)
    refuse_other(out, manifest.request, request)
    return manifest


def _make_tokenizer(
    source: Source, out: Path, settings: Settings, progress: Progress, quiet: bool
) -> Tokenizer:
    path = out / f"tokenizer{Path(settings.tokenizer).suffix if settings.tokenizer else '.model'}"
    if progress.tokenizer_sha256 is not None:
        tokenizer = load_tokenizer(path)
        if tokenizer.sha256 != progress.tokenizer_sha256:
            raise UserError(f"{path} was changed since {out} was begun: remove that folder")
        return tokenizer
    if settings.tokenizer:
        config = Path(settings.tokenizer).with_name("tokenizer_config.json")  # names bos and eos
        if path.suffix == ".json" and config.is_file():
            shutil.copyfile(config, out / config.name)
        shutil.copyfile(settings.tokenizer, path)
        tokenizer = load_tokenizer(path)
    else:
        assert settings.vocab_size is not None
        if not quiet:
            what = f"{settings.vocab_size} pieces on {source.description()}"
            print(f"{out}: training a tokenizer of {what}", file=sys.stderr)
        tokenizer = train_tokenizer(_sample(source, settings), settings.vocab_size, path)
    progress.tokenizer_sha256 = tokenizer.sha256
    progress.save(out)
    return tokenizer


def _sample(source: Source, settings: Settings) -> Iterator[str]:
    """Yield the first training documents, for the tokenizer; validation text stays unseen."""
    size = 0
    for _, text in source.documents([]):
        if not _in_validation(text, settings.val_fraction):
            size += len(text.encode())
            yield text
        if size >= SAMPLE_BYTES:
            return


def _in_validation(text: str, fraction: float) -> bool:
    """By the text alone: where a document lies does not matter, and its copies are on its side."""
    return _place(text) < fraction


def _place(text: str) -> float:
    """Of the text by its hash, from 0 to 1: below --val-fraction it is held out."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _write_parts(
    source: Source,
    out: Path,
    settings: Settings,
    progress: Progress,
    tokenizer: Tokenizer,
    skipped: list[str],
    quiet: bool,
) -> str:
    """Write the parts that are missing; return the digest over all documents."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    total = source.total_bytes()
    bar = tqdm(desc="tokenising", total=total, unit="B", unit_scale=True, disable=True if quiet else None)
    with bar:

        def read() -> Iterator[str]:
            for _, text in source.documents(skipped):
                raw = text.encode()
                digest.update(len(raw).to_bytes(8, "big") + raw)
                bar.update(len(raw))
                yield text

        documents = read()
        for part in progress.parts:
            passed = sum(1 for _ in islice(documents, part.documents))
            if passed != part.documents or digest.hexdigest() != part.digest:
                raise UserError(f"the text has changed since {out} was begun: remove that folder")
        while part := _write_part(documents, out, settings, len(progress.parts), tokenizer):
            part.digest = digest.hexdigest()
            progress.parts.append(part)
            progress.save(out)
    return digest.hexdigest()


def _write_part(
    documents: Iterator[str], out: Path, settings: Settings, number: int, tokenizer: Tokenizer
) -> Part | None:
    """Write the next part's shards; None if there are no documents left. The caller fills in the digest."""
    writers: dict[str, ShardWriter] = {}
    count = 0
    try:
        for chunk in _chunks(documents, settings.shard_mb * (1 << 20)):
            count += len(chunk)
            for split, texts in _split_up(chunk, settings.val_fraction).items():
                if split not in writers:
                    writers[split] = ShardWriter(out, f"{split}-{number:05d}.arrow", _dtype(tokenizer))
                ids = tokenizer.encode_batch(texts, min(os.cpu_count() or 1, MOST_THREADS))
                rows = [[tokenizer.bos_id, *row, tokenizer.eos_id] for row in ids]
                writers[split].write(rows, sum(len(text.encode()) for text in texts))
        if count == 0:
            return None
        shards = {split: writer.finish() for split, writer in writers.items()}
        return Part(count, "", shards.get("train"), shards.get("validation"))
    finally:
        for writer in writers.values():
            writer.close()


def _chunks(documents: Iterator[str], part_bytes: float) -> Iterator[list[str]]:
    """Yield lists of documents of about CHUNK_BYTES, up to about `part_bytes` in all."""
    chunk: list[str] = []
    size = part_size = 0
    for text in documents:
        chunk.append(text)
        size += len(text.encode())
        if size >= CHUNK_BYTES or part_size + size >= part_bytes:
            yield chunk
            part_size += size
            if part_size >= part_bytes:
                return
            chunk, size = [], 0
    if chunk:
        yield chunk


def _split_up(chunk: list[str], val_fraction: float) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for text in chunk:
        splits.setdefault("validation" if _in_validation(text, val_fraction) else "train", []).append(text)
    return splits


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _finish(
    source: Source,
    out: Path,
    settings: Settings,
    progress: Progress,
    tokenizer: Tokenizer,
    skipped: list[str],
    digest: str,
) -> Manifest:
    """Check that both splits hold documents, and write token_bytes.npy and the manifest."""
    train = tuple(part.train for part in progress.parts if part.train)
    validation = tuple(part.validation for part in progress.parts if part.validation)
    if not train or (settings.val_fraction > 0 and not validation):
        discard(out, progress)  # or it would stand in the way of better arguments
        raise UserError(_one_sided(source, settings.val_fraction, "validation" if train else "train"))
    train_counts, validation_counts = (
        count_tokens((out / shard.file for shard in shards), tokenizer.vocab_size)
        for shards in (train, validation)
    )
    identity = [digest, tokenizer.sha256, tokenizer.bos_id, tokenizer.eos_id, settings.val_fraction]
    manifest = Manifest(
        request=progress.request,
        source=source.description(),
        tokenizer_file=tokenizer.path.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype=_dtype(tokenizer).name,
        train=Split(train, unigram_nats(train_counts, train_counts)),
        validation=Split(validation, unigram_nats(validation_counts, train_counts + 1)),
        skipped=len(skipped),
        skipped_examples=tuple(skipped[:20]),
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
    )
    aside = out / (TOKEN_BYTES + ".part")
    with aside.open("wb") as file:
        np.save(file, tokenizer.token_bytes())
    os.replace(aside, out / TOKEN_BYTES)
    write_text(out / MANIFEST, to_json(manifest))
    close_progress(out)
    return manifest


def _one_sided(source: Source, fraction: float, empty: str) -> str:
    """Why one split is empty, and a fraction that fills both; not for a hub's, which it would read again."""
    places = sorted({_place(text) for _, text in source.documents([])}) if source.kind != "hub" else [1.0]
    better = math.ceil(places[0] * 1000 + 1) / 1000  # above the first
    held_out = sum(place < better for place in places)
    change = f"--val-fraction {better:g} holds out {held_out} of {len(places)}; or "
    what = f"no document fell into the {empty} split with --val-fraction {fraction}: "
    more = " (--document-lines N cuts files into some)" if source.kind == "files" else ""
    return f"{what}{change if held_out < len(places) else 'change it, or '}give more documents{more}"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; `paths`, and what else a source takes, are named as its fields."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--val-fraction", type=float, default=0.05, help="share of documents held out (0.05)")
    common.add_argument("--shard-mb", type=float, default=32, help="MiB of text a shard (32)")
    common.add_argument("--quiet", action="store_true", help="print nothing but errors")
    pieces = common.add_mutually_exclusive_group()
    pieces.add_argument("--vocab-size", type=int, help="train a tokenizer of this many pieces")
    pieces.add_argument("--tokenizer", help="use this sentencepiece .model or tokenizer.json instead")
    bad = argparse.ArgumentParser(add_help=False)
    bad.add_argument("paths", nargs="+", help="files, folders or quoted globs")
    bad.add_argument(
        "--on-bad-file", choices=["stop", "skip"], default="stop", help="binary or broken input (stop)"
    )

    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Prepare text for training.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="SOURCE")
    stdlib = kinds.add_parser("stdlib", parents=[common], help="the running Python's standard library")
    files = kinds.add_parser("files", parents=[common, bad], help="text files")
    files.add_argument("--document-lines", type=int, help="cut files into documents of this many lines")
    jsonl = kinds.add_parser("jsonl", parents=[common, bad], help="JSON lines")
    jsonl.add_argument("--text-key", default="text", help="where a line has its text (text)")
    parquet = kinds.add_parser("parquet", parents=[common, bad], help="Parquet files")
    parquet.add_argument("--text-column", default="text", help="the column with the text (text)")
    hub = kinds.add_parser("hub", parents=[common], help="a Hugging Face dataset, streamed")
    hub.add_argument("dataset", help="its name on the hub")
    hub.add_argument("--subset", help="its configuration, such as en (none)")
    hub.add_argument("--split", default="train", help="the split to read (train)")
    hub.add_argument("--text-column", default="text", help="the column with the text (text)")
    for kind in (stdlib, files, jsonl, parquet, hub):
        default = "prepared/stdlib" if kind is stdlib else None
        kind.add_argument(
            "--out",
            default=default,
            required=default is None,
            help=f"the folder to write ({default})" if default else "the folder to write",
        )
    arguments = parser.parse_args(argv)
    if arguments.kind == "stdlib" and arguments.vocab_size is None and arguments.tokenizer is None:
        arguments.vocab_size = 4096
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    arguments = parse_arguments(argv)
    sources = {kind.kind: kind for kind in (StdlibSource, FilesSource, JsonlSource, ParquetSource, HubSource)}
    kind = sources[arguments.kind]
    given = {name: getattr(arguments, name) for name in (item.name for item in dataclasses.fields(kind))}
    if "paths" in given:
        given["paths"] = tuple(given["paths"])
    settings = Settings(arguments.vocab_size, arguments.tokenizer, arguments.val_fraction, arguments.shard_mb)
    there = (Path(arguments.out) / MANIFEST).is_file()
    try:
        manifest = prepare(kind(**given), arguments.out, settings, arguments.quiet)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk, or a file that may not be read
        again = "put it right and run the same command again: it continues"
        print(f"error: {error}; {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to continue", file=sys.stderr)
        return 130
    if not arguments.quiet:
        if there:
            print(f"{arguments.out} was there already; to read the text anew, remove that folder")
        print(summary(arguments.out, manifest))
    return 0
