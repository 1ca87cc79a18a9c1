"""Compose conf/ and overrides into a `Config`, and convert a `Config` to plain values and back."""

from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv2.config.fields import CONF, field_types
from dsv2.config.mistakes import COMPOSITION_ERRORS, check_command_line, explain, unknown_key
from dsv2.config.renamed import with_new_names
from dsv2.config.schema import Config
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
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return compose("config", overrides)
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


def check_shown(arguments: list[str]) -> None:
    """Refuse unknown keys with `--cfg`, which Hydra answers itself.

    Args:
        arguments: train.py's whole command line.
    """
    if any(argument == "-c" or argument.startswith("--cfg") for argument in arguments):
        _check_keys(compose_overrides([a for a in arguments if "=" in a and not a.startswith("-")]))


def _check_keys(composed: DictConfig) -> None:
    known = field_types()
    for key in _keys(composed):
        if key not in known:
            raise UserError(unknown_key(key, f"+{key}={OmegaConf.select(composed, key)}"))


def to_plain(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dicts, lists, numbers and strings."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def from_plain(plain: dict[str, Any]) -> Config:
    """Return the typed configuration for a result of `to_plain`; a field that it lacks gets its default.

    Raises:
        UserError: a field does not exist, or a value has the wrong type.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), with_new_names(plain)))
    except OmegaConfBaseException as error:
        raise UserError(
            f"a saved configuration does not fit this version: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in node:
        keys.append(f"{prefix}{name}")
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            keys += _keys(child, f"{prefix}{name}.")
    return keys
