"""The registry of the data sources, and the functions that training calls."""

from typing import Any

from data.config import DataConfig
from data.errors import UserError
from data.streams.base import DataSource, Ranks, Stream, require_same
from data.streams.folder import LocalSource, StdlibSource
from data.streams.hub import HubSource

SOURCES: tuple[DataSource, ...] = (StdlibSource(), LocalSource(), HubSource())

LEAST = {"sequence_length": 1, "lanes": 1, "shuffle_window": 1, "vocab_size": 1, "seed": 0}


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
    source_of(config).check_config(config)


def build_stream(config: DataConfig, vocab_size: int, ranks: Ranks) -> Stream:
    """Return the training stream for this rank, which `ranks` share; call the source's `check` first."""
    return source_of(config).training(config, vocab_size, ranks)


def check_resumed(config: DataConfig, state: dict[str, Any]) -> None:
    """Refuse a stream's saved `state` if it belongs to other data; call the source's `check` first."""
    if not isinstance(saved := state.get("fingerprint"), dict):
        raise UserError(f"the checkpoint's data has fingerprint={saved!r}; use an older checkpoint")
    require_same(saved, source_of(config).fingerprint(config))
