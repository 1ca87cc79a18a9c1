"""Compose conf/ and overrides into a `Config`, and convert a `Config` to plain values and back."""

import dataclasses
import enum
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from data.reading import read_text
from dsv2.config.fields import CONF, field_types
from dsv2.config.mistakes import (
    COMPOSITION_ERRORS,
    check_command_line,
    explain,
    names_key,
    not_bool,
    unknown_key,
)
from dsv2.config.renamed import with_new_names
from dsv2.config.schema import Config
from dsv2.config.typed import as_typed, literal
from dsv2.errors import UserError

# How messages show the value of a field that must be given.
_WANTED = {"data.path": "FOLDER with a folder that `python -m dsv2 prepare` wrote"}


def register_schema() -> None:
    """Register the dataclasses with Hydra as the node `schema`, with which conf/config.yaml begins."""
    ConfigStore.instance().store(name="schema", node=Config)


def compose_overrides(overrides: list[str]) -> DictConfig:
    """Compose `conf/` with these overrides, for command lines that Hydra does not read itself.

    Raises:
        UserError: Hydra refuses an override.
    """
    register_schema()
    check_command_line(overrides)
    _check_scaling(overrides)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return compose("config", [as_typed(override) for override in overrides])
    except COMPOSITION_ERRORS as error:
        raise explain(error, overrides) from None


def to_config(composed: DictConfig) -> Config:
    """Return the typed configuration.

    Raises:
        UserError: a key is no field (Hydra itself accepts `+key=value`), or a field has no value.
    """
    _check_keys(composed)
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise UserError(f"{missing[0]}: must be given, as {missing[0]}={_WANTED.get(missing[0], 'VALUE')}")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def compose_config(overrides: list[str]) -> Config:
    """Return the configuration that train.py would have with these overrides; other commands call this.

    Raises:
        UserError: an override is wrong.
    """
    composed = compose_overrides(overrides)
    try:
        return to_config(composed)
    except COMPOSITION_ERRORS as error:
        raise explain(error, overrides) from None


def _check_scaling(overrides: list[str]) -> None:
    """Refuse fields of YaRN for plain RoPE. Hydra answers them with a traceback or ignores them."""
    name = "model.rope_scaling"
    of_scaling = [o for o in overrides if names_key(o, name) and o.lstrip("+") != f"{name}=null"]
    if not of_scaling:
        return
    rest = [override for override in overrides if override not in of_scaling]
    if compose_overrides(rest).model.rope_scaling is None:
        raise UserError(f"{of_scaling[0]}: plain RoPE has no such field; choose rope_scaling=yarn too")


def check_composition(arguments: list[str]) -> None:
    """Refuse what Hydra does not refuse itself: YaRN's fields for plain RoPE, and unknown keys with `--cfg`.

    Args:
        arguments: train.py's whole command line.
    """
    _check_scaling([a for a in arguments if "=" in a and not a.startswith("-")])
    if any(argument == "-c" or argument.startswith("--cfg") for argument in arguments):
        _check_keys(compose_overrides([a for a in arguments if "=" in a and not a.startswith("-")]))


def _check_keys(composed: DictConfig) -> None:
    known = field_types()
    for key in _keys(composed):
        if key not in known:
            raise UserError(unknown_key(key, f"+{key}={OmegaConf.select(composed, key)}"))


def to_plain(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dicts, lists, numbers and strings."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, enum.Enum) else value


def from_plain(plain: dict[str, Any], what: str = "a saved configuration") -> Config:
    """Return the typed configuration for a result of `to_plain`; a field that it lacks gets its default.

    A saved configuration may come from someone else. Its texts are taken literally: `${oc.env:NAME}` stays
    these characters, and nothing of this machine's environment enters the configuration.

    Args:
        what: names the saved configuration in errors.

    Raises:
        UserError: a field does not exist, or a value has the wrong type.
    """
    with _saved(what):
        config = OmegaConf.to_object(_merged(plain))
    assert isinstance(config, Config)
    return config


def check_saved(plain: dict[str, Any], what: str) -> None:
    """Refuse what `from_plain` refuses, except a missing data.path."""
    with _saved(what):
        _merged(plain)


def _merged(plain: dict[str, Any]) -> Any:
    if wrong := not_bool("", with_new_names(plain)):
        raise ValidationError(wrong)
    return OmegaConf.merge(OmegaConf.structured(Config), _literal(with_new_names(plain)))


@contextmanager
def _saved(what: str) -> Iterator[None]:
    """Turn OmegaConf's complaints about a saved configuration into one line."""
    try:
        yield
    except OmegaConfBaseException as error:
        field = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{what} does not fit this version: {field}{str(error).splitlines()[0]}") from error


def _literal(value: Any) -> Any:
    """Return a copy in which OmegaConf finds no interpolation in any text."""
    if isinstance(value, dict):
        return {name: _literal(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return literal(value) if isinstance(value, str) else value


def read_saved(path: Path) -> Config:
    """Return the configuration in a run's config.yaml.

    Raises:
        UserError: the file is missing or no YAML, has a tag that would create an object, or does not fit.
        Unreadable: the file system refuses to read the file.
    """
    try:
        plain = yaml.safe_load(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} the directory of a run?") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: is not the configuration of a run ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(plain, dict):
        raise UserError(f"{path}: is not the configuration of a run")
    return from_plain(plain, str(path))


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in node:
        keys.append(f"{prefix}{name}")
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            keys += _keys(child, f"{prefix}{name}.")
    return keys
