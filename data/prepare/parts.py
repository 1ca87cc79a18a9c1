"""The shards of a preparation, part by part, so that an interrupted run continues after its last part.

A part holds consecutive documents: at most one train and one validation shard. The progress file keeps
a digest of all documents up to the end of each part, which tells whether the text has changed since.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.corpora.base import Corpus
from data.errors import UserError
from data.prepare.progress import Part, Progress
from data.prepare.settings import Settings
from data.prepared.shards import ShardWriter
from data.tokenizers.base import Tokenizer

CHUNK_BYTES = 1 << 20  # text tokenised at once: one record batch per split
MOST_THREADS = 16


@dataclass
class Preparation:
    """One run of `prepare`: its arguments, its progress, and the state of the documents read so far."""

    corpus: Corpus
    out: Path
    settings: Settings
    progress: Progress
    quiet: bool
    skipped: list[str] = field(default_factory=list)  # ids of documents that could not be read
    digest: Any = field(default_factory=hashlib.sha256)  # over all documents read


def in_validation(text: str, fraction: float) -> bool:
    """Return whether a document is held out. Only its text decides, so copies are in the same split."""
    return position_in_split(text) < fraction


def position_in_split(text: str) -> float:
    """Return a hash of the text in [0, 1); below --val-fraction, the text is held out."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def id_type(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def write_parts(run: Preparation, tokenizer: Tokenizer) -> None:
    """Read all documents and write the parts that are missing."""
    from tqdm import tqdm

    total = run.corpus.total_bytes()
    if not run.quiet:
        print(f"{run.out}: tokenising the documents", file=sys.stderr)
    silent = True if run.quiet else None  # None: silent unless on a terminal
    with tqdm(desc="tokenising", total=total, unit="B", unit_scale=True, disable=silent) as bar:
        documents = _read(run, bar)
        for part in run.progress.parts:
            count = sum(1 for _ in islice(documents, part.documents))
            if count != part.documents or run.digest.hexdigest() != part.digest:
                raise UserError(
                    f"--out {run.out}: the text has changed since the preparation began; remove the folder"
                )
        while part := _write_part(run, documents, tokenizer):
            part.digest = run.digest.hexdigest()
            run.progress.parts.append(part)
            run.progress.save(run.out)


def _read(run: Preparation, bar: Any) -> Iterator[str]:
    for _, text in run.corpus.documents(run.skipped):
        raw = text.encode()
        run.digest.update(len(raw).to_bytes(8, "big") + raw)
        bar.update(len(raw))
        yield text


def _write_part(run: Preparation, documents: Iterator[str], tokenizer: Tokenizer) -> Part | None:
    """Write the next part's shards. Return None if no documents are left. The caller fills in the digest."""
    writers: dict[str, ShardWriter] = {}
    number = len(run.progress.parts)
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    count = 0
    try:
        for chunk in _chunks(documents, run.settings.shard_mb * (1 << 20)):
            count += len(chunk)
            for split, texts in _by_split(chunk, run.settings.val_fraction).items():
                if split not in writers:
                    writers[split] = ShardWriter(run.out, f"{split}-{number:05d}.arrow", id_type(tokenizer))
                ids = tokenizer.encode_batch(texts, threads)
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
    size = 0
    part_size = 0
    for text in documents:
        chunk.append(text)
        size += len(text.encode())
        if size >= CHUNK_BYTES or part_size + size >= part_bytes:
            yield chunk
            part_size += size
            if part_size >= part_bytes:
                return
            chunk = []
            size = 0
    if chunk:
        yield chunk


def _by_split(chunk: list[str], val_fraction: float) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for text in chunk:
        splits.setdefault("validation" if in_validation(text, val_fraction) else "train", []).append(text)
    return splits
