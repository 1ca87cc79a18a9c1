"""Turn a corpus into a prepared folder: tokenizer, Arrow shards, token_bytes.npy and, last, manifest.json.

An interrupted run continues after its last finished part. It writes the same bytes as an uninterrupted run.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.corpora.base import Corpus
from data.errors import UserError
from data.prepare.parts import Preparation, id_type, in_validation, position_in_split, write_parts
from data.prepare.progress import (
    LOCK,
    close_progress,
    discard,
    open_progress,
    refuse_foreign,
    refuse_other,
    write_text,
)
from data.prepare.settings import Settings
from data.prepared.manifest import MANIFEST, TOKEN_BYTES, Manifest, Split, load_manifest, to_json
from data.prepared.shards import count_tokens, unigram_nats
from data.reading import is_file
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.train import train_tokenizer

SAMPLE_BYTES = 32 << 20  # the tokenizer is trained on the first training documents up to this many bytes


def prepare(corpus: Corpus, out: str | Path, settings: Settings, quiet: bool = False) -> Manifest:
    """Prepare `corpus` in the folder `out`, or return at once if that was done before.

    Several processes may call this at once: one does the work, the others wait for it.

    Raises:
        UserError: bad settings, no text, unreadable documents, or an `out` that cannot be written or
            holds something else.
    """
    from filelock import FileLock

    settings.check()
    out = Path(out)
    request = {**corpus.request(), **settings.request()}
    if manifest := _finished(out, request):
        return manifest
    if next(corpus.documents([]), None) is None:
        raise UserError(f"there is no text in {corpus.description()}")
    refuse_foreign(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK).acquire()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    with lock:
        if manifest := _finished(out, request):  # by the process that held the lock
            return manifest
        run = Preparation(corpus, out, settings, open_progress(out, request), quiet)
        tokenizer = _make_tokenizer(run)
        write_parts(run, tokenizer)
        return _finish(run, tokenizer)


def _finished(out: Path, request: dict[str, Any]) -> Manifest | None:
    if not is_file(out / MANIFEST):
        return None
    manifest = load_manifest(out)
    refuse_other(out, manifest.request, request)
    return manifest


def _make_tokenizer(run: Preparation) -> Tokenizer:
    """Return the folder's tokenizer: an earlier run's, a copy of the user's, or a newly trained one."""
    settings = run.settings
    path = run.out / f"tokenizer{Path(settings.tokenizer).suffix if settings.tokenizer else '.model'}"
    if run.progress.tokenizer_sha256 is not None:
        tokenizer = load_tokenizer(path)
        if tokenizer.sha256 != run.progress.tokenizer_sha256:
            raise UserError(
                f"--out {run.out}: {path.name} has changed since the preparation began; remove the folder"
            )
        return tokenizer
    if settings.tokenizer:
        config = Path(settings.tokenizer).with_name("tokenizer_config.json")  # names bos and eos
        if path.suffix == ".json" and config.is_file():
            shutil.copyfile(config, run.out / config.name)
        shutil.copyfile(settings.tokenizer, path)
        tokenizer = load_tokenizer(path)
    else:
        assert settings.vocab_size is not None
        if not run.quiet:
            what = f"{settings.vocab_size} pieces on {run.corpus.description()}"
            print(f"{run.out}: training a tokenizer of {what}", file=sys.stderr)
        sample = _sample(run.corpus, settings.val_fraction)
        tokenizer = train_tokenizer(sample, settings.vocab_size, path)
    run.progress.tokenizer_sha256 = tokenizer.sha256
    run.progress.save(run.out)
    return tokenizer


def _sample(corpus: Corpus, val_fraction: float) -> Iterator[str]:
    """Yield the first training documents. The tokenizer is trained on them, never on validation text."""
    size = 0
    for _, text in corpus.documents([]):
        if not in_validation(text, val_fraction):
            size += len(text.encode())
            yield text
        if size >= SAMPLE_BYTES:
            return


def _finish(run: Preparation, tokenizer: Tokenizer) -> Manifest:
    """Check that both splits hold documents; write token_bytes.npy and the manifest."""
    train = tuple(part.train for part in run.progress.parts if part.train)
    validation = tuple(part.validation for part in run.progress.parts if part.validation)
    if not train or (run.settings.val_fraction > 0 and not validation):
        discard(run.out, run.progress)  # so that other arguments can be tried in the same folder
        raise UserError(_empty_split(run, "validation" if train else "train"))
    train_counts = count_tokens(run.out, train, tokenizer.vocab_size)
    validation_counts = count_tokens(run.out, validation, tokenizer.vocab_size)
    token_bytes = tokenizer.token_bytes()
    manifest = Manifest(
        request=run.progress.request,
        source=run.corpus.description(),
        tokenizer_file=tokenizer.path.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype=id_type(tokenizer).name,
        train=Split(train, unigram_nats(train_counts, train_counts)),
        validation=Split(validation, unigram_nats(validation_counts, train_counts + 1)),
        skipped=len(run.skipped),
        skipped_examples=tuple(run.skipped[:20]),
        fingerprint=_fingerprint(run, tokenizer),
        token_bytes_crc32=zlib.crc32(token_bytes.data),
    )
    aside = run.out / (TOKEN_BYTES + ".part")
    with aside.open("wb") as file:
        np.save(file, token_bytes)
    os.replace(aside, run.out / TOKEN_BYTES)
    write_text(run.out / MANIFEST, to_json(manifest))
    close_progress(run.out)
    return manifest


def _fingerprint(run: Preparation, tokenizer: Tokenizer) -> str:
    text = run.digest.hexdigest()
    identity = [text, tokenizer.sha256, tokenizer.bos_id, tokenizer.eos_id, run.settings.val_fraction]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _empty_split(run: Preparation, empty: str) -> str:
    """Return why one split is empty, and a fraction that fills both if the corpus can be read once more."""
    fraction = run.settings.val_fraction
    advice = "change it, or "
    if not run.corpus.costly:
        positions = sorted({position_in_split(text) for _, text in run.corpus.documents([])})
        better = math.ceil(positions[0] * 1000 + 1) / 1000  # above the first position
        held_out = sum(position < better for position in positions)
        if held_out < len(positions):
            advice = f"--val-fraction {better:g} holds out {held_out} of {len(positions)}; or "
    hint = f" ({run.corpus.if_too_few})" if run.corpus.if_too_few else ""
    return f"--val-fraction {fraction}: leaves the {empty} split empty; {advice}give more documents{hint}"
