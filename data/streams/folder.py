"""Prepared folders as data sources: `local`, and `stdlib`, which prepares its folder on first use."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.config import DataConfig
from data.corpora.stdlib import StdlibCorpus
from data.errors import UserError
from data.prepare.corpus import prepare
from data.prepare.settings import Settings
from data.prepared.manifest import MANIFEST, PROGRESS, load_manifest
from data.prepared.packing import open_split
from data.prepared.verify import check_small_files, check_tokenizer, read_token_bytes
from data.reading import is_file
from data.streams.base import DataSource, Ranks, require_count, require_vocabulary
from data.streams.map_stream import MapStream
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer


class LocalSource(DataSource):
    """A folder that `python -m data.prepare` wrote."""

    name = "local"
    tokenizer_field = "path"
    hashed: ClassVar = {"dataset": "path"}

    def check(self, config: DataConfig, vocab_size: int, validation: int) -> None:
        manifest = load_manifest(config.path)
        check_small_files(Path(config.path), manifest)
        require_vocabulary(manifest.vocab_size, vocab_size, f"the tokenizer of {config.path}")
        open_split(config.path, "train", config.sequence_length, vocab_size)
        if validation:
            held_out = open_split(config.path, "validation", config.sequence_length, vocab_size)
            require_count(validation, len(held_out), config)

    def tokenizer(self, config: DataConfig) -> Tokenizer:
        manifest = load_manifest(config.path)
        check_tokenizer(Path(config.path), manifest)
        return load_tokenizer(Path(config.path) / manifest.tokenizer_file)

    def training(self, config: DataConfig, vocab_size: int, ranks: Ranks) -> MapStream:
        sequences = open_split(config.path, "train", config.sequence_length, vocab_size)
        return MapStream(sequences, config.seed, self.fingerprint(config))

    def validation(self, config: DataConfig, vocab_size: int, count: int) -> np.ndarray:
        sequences = open_split(config.path, "validation", config.sequence_length, vocab_size)
        require_count(count, len(sequences), config)
        return sequences.take(np.arange(count))

    def token_bytes(self, config: DataConfig) -> np.ndarray:
        return read_token_bytes(Path(config.path), load_manifest(config.path))

    def unigram_nats(self, config: DataConfig) -> float | None:
        return load_manifest(config.path).validation.unigram_nats

    def fingerprint(self, config: DataConfig) -> dict[str, Any]:
        dataset = load_manifest(config.path).fingerprint
        return {"dataset": dataset, "sequence_length": config.sequence_length, "seed": config.seed}


class StdlibSource(LocalSource):
    """The running Python's standard library."""

    name = "stdlib"

    def check(self, config: DataConfig, vocab_size: int, validation: int) -> None:
        folder = Path(config.path)
        if is_file(folder / MANIFEST):
            _refuse_other_content(config)
        elif not folder.name.startswith(self.name) and not is_file(folder / PROGRESS):
            raise UserError(
                f"data.path={config.path}: holds no finished preparation; data=stdlib, the default, makes "
                f"only folders named {self.name}... Add data=local for a folder of yours, or run: "
                f"python -m dsv2 prepare stdlib --out {config.path}"
            )
        require_vocabulary(config.vocab_size, vocab_size, "data.vocab_size")
        prepare(StdlibCorpus(), config.path, Settings(vocab_size=config.vocab_size))
        super().check(config, vocab_size, validation)


def _refuse_other_content(config: DataConfig) -> None:
    """Refuse a folder prepared with other settings; name the configuration's fields, not options."""
    request = load_manifest(config.path).request
    kind = request.get("kind")
    pieces = request.get("vocab_size")
    if kind != "stdlib":
        raise UserError(
            f"data.path={config.path}: holds {kind} data, but data=stdlib, the default, needs the standard "
            "library; add data=local to train on this folder"
        )
    if pieces != config.vocab_size:
        raise UserError(
            f"data.vocab_size={config.vocab_size}: {config.path} was prepared with {pieces}; "
            "use that value, or another folder as data.path"
        )
