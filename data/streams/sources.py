"""The registry of the data sources, and the functions that training calls."""

from collections.abc import Mapping
from typing import Any

from data.config import DataConfig
from data.errors import UserError
from data.streams.base import DataSource, Ranks, Stream, require_same
from data.streams.folder import LocalSource, StdlibSource
from data.streams.hub import HubSource

SOURCES: tuple[DataSource, ...] = (StdlibSource(), LocalSource(), HubSource())

LEAST = {"sequence_length": 2, "lanes": 1, "shuffle_window": 1, "vocab_size": 1, "seed": 0}


def source_of(config: DataConfig) -> DataSource:
    """Return the source that `data.source` names."""
    for source in SOURCES:
        if source.name == config.source:
            return source
    names = ", ".join(source.name for source in SOURCES)
    raise UserError(f"data.source={config.source}: must be one of {names}")


def check_config(config: DataConfig) -> None:
    """Refuse values of the section `data` that cannot be right. Reads no file and imports no torch."""
    for name, least in LEAST.items():
        if getattr(config, name) < least:
            raise UserError(f"data.{name}={getattr(config, name)}: must be at least {least}")
        if getattr(config, name) >= 1 << 63:
            raise UserError(f"data.{name}={getattr(config, name)}: must be below 2^63")
    source_of(config).check_config(config)


def build_stream(config: DataConfig, vocab_size: int, ranks: Ranks) -> Stream:
    """Return the training stream for this rank, which `ranks` share; call the source's `check` first."""
    return source_of(config).training(config, vocab_size, ranks)


def check_resumed(config: DataConfig, state: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse a stream's saved `state` if it belongs to other data; call the source's `check` first.

    Args:
        saved: the section `data` of the configuration that the state was saved with.
    """
    source = source_of(config)
    if not isinstance(fingerprint := state.get("fingerprint"), dict):
        raise UserError(f"the checkpoint's data has fingerprint={fingerprint!r}; use an older checkpoint")
    hashes = {key: _difference(field, saved.get(field), config) for key, field in source.hashed.items()}
    require_same(fingerprint, source.fingerprint(config), hashes)


def _difference(field: str, before: Any, config: DataConfig) -> str:
    now = getattr(config, field)
    if before == now:
        return f"data.{field}={now} has other content than when the checkpoint was saved"
    return f"data.{field} was {before!r}, is {now!r}, which has other content"


def check_tokenizer(config: DataConfig, saved: Mapping[str, str] | None, owner: str) -> None:
    """Refuse data whose tokenizer has other pieces than the one of the weights' `owner`.

    Args:
        saved: a result of `Tokenizer.record`; None: unknown, so nothing is compared.
    """
    source = source_of(config)
    tokenizer = source.tokenizer(config)
    if saved is None or saved["pieces_sha256"] == tokenizer.pieces_sha256:
        return
    field = source.tokenizer_field
    raise UserError(
        f"data.{field}={getattr(config, field)}: its tokenizer {tokenizer.path} has other pieces than "
        f"{saved['file']}, with which {owner} was trained; prepare the data with that one "
        "(--tokenizer FILE)"
    )
