"""Turn a mistake in the configuration into one line that names the field and suggests what would be right."""

import difflib
import re
import typing
from collections.abc import Collection
from enum import Enum
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import OmegaConfBaseException, ValidationError

from dsv2.config.fields import GROUPS, field_docs, field_types, options_of
from dsv2.config.renamed import FIELDS, OPTIONS
from dsv2.config.rules import TOKENS, written
from dsv2.config.typed import as_typed
from dsv2.errors import UserError

# What Hydra and OmegaConf raise for a mistake in a configuration.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)

HYDRA_OPTIONS = ("help", "h", "hydra-help", "version", "cfg", "c", "resolve", "package", "p", "info", "i")

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

SHORT = {  # the planner's short names
    "ep": "parallel.expert_parallel_size",
    "zero": "parallel.zero_stage",
    "micro_batch": "runtime.micro_batch_size",
}


def unknown_key(key: str, override: str | None = None, words: Collection[str] = ()) -> str:
    """Return the message for a key that is no field; it suggests the nearest field.

    Args:
        key: dotted name.
        override: the override as the user wrote it, if it is known.
        words: further keys that the command line takes.
    """
    if key in FIELDS:
        return f"{override or key}: this field is now {FIELDS[key]}"
    names = [*words, *field_types()]
    last = key.split(".")[-1]
    near = [SHORT[key]] if key in SHORT else difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    if not near:  # the right name in the wrong section, such as lr for optim.lr
        leaf = difflib.get_close_matches(last, [n.split(".")[-1] for n in names], n=1, cutoff=0.7)
        near = [n for n in names if leaf and n.split(".")[-1] == leaf[0]]
    if not near:  # a field's meaning, such as learning_rate for optim.lr
        near = _described_as(last.replace("_", " "))
    hint = f"did you mean {near[0]}?" if near else "python -m dsv2 train --help lists all fields"
    if last in ("steps", "max_steps", "num_steps", "train_steps", "epochs", "max_epochs"):
        hint = "optim.total_tokens sets the length of a run, stop_step stops it earlier"
    return f"{override or key}: there is no such field; {hint}"


def _described_as(words: str) -> list[str]:
    """Return the field whose comment ends with these words; no field if there are several."""
    fields = [field.name for field in field_docs() if f" {field.text}".endswith(f" {words}")]
    return fields if len(fields) == 1 else []


def check_command_line(overrides: list[str], read_by_hydra: bool = False) -> None:
    """Refuse sweeps, and overrides such as `model=null` or `+optim=1`, which Hydra answers with a traceback.

    Options such as --cfg job, and their words, are let through where the command line is `read_by_hydra`.

    Raises:
        UserError: names the override and what would be right.
    """
    asks_hydra = read_by_hydra and any(override.startswith("-") for override in overrides)
    for override in overrides:
        _check_form(override, asks_hydra)
    parsed = [_parsed(o) for o in overrides if not (asks_hydra and (o.startswith("-") or "=" not in o))]
    for override in parsed:
        key = override.key_or_group
        if override.is_delete():
            _refuse_removal(override.input_line, key)
        value = override.value()
        is_choice = override.type is OverrideType.CHANGE and isinstance(value, str) and value.isidentifier()
        if key in GROUPS and key != "experiment" and not is_choice:
            raise UserError(f"{override.input_line}: must name a file of conf/{key}, without .yaml")
        if wrong := not_bool(key, value):
            raise UserError(wrong)
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: {ONE_RUN}")


def not_bool(key: str, value: Any) -> str | None:
    """Describe the first field of the type bool that has another value: OmegaConf takes 3 and `on` for true.

    Args:
        key: dotted name of a field or a section.
        value: the field's value, or a dict with the section's values.
    """
    if isinstance(value, dict):
        inside = (not_bool(f"{key}.{name}".lstrip("."), item) for name, item in value.items())
        return next(filter(None, inside), None)
    is_right = written(value).lower() in ("true", "false") or "${" in str(value)
    if is_right or field_types().get(key) is not bool:
        return None
    return f"{key}={written(value)}: must be {KINDS[bool]}"


def _refuse_removal(override: str | None, key: str) -> NoReturn:
    """Every field and group is needed, so none can be removed with `~`."""
    if key in GROUPS or key in field_types():
        raise UserError(f"{override}: must be set to a value; nothing of the configuration can be removed")
    raise UserError(unknown_key(key, override))


def _check_form(override: str, asks_hydra: bool) -> None:
    """Refuse options that do not exist and words without `=`."""
    if override in ("-m", "--multirun"):
        raise UserError(f"{override}: {ONE_RUN}")
    name = override.lstrip("-").split("=")[0]
    if override.startswith("--") and (name == "experiment" or name in field_types()):
        right = f"{name}={override.partition('=')[2] or 'VALUE'}"
        raise UserError(f"{override}: must be written without dashes, such as {right}")
    if asks_hydra and override.startswith("-") and name not in HYDRA_OPTIONS:
        raise UserError(f"{override}: there is no such option; train.py --help lists the options")
    as_option = override.startswith("-") or ("=" not in override and not override.startswith("~"))
    if as_option and not asks_hydra:
        raise UserError(f"{override}: must be written as name=value, such as experiment=quickstart")
    if override in OPTIONS:
        raise UserError(f"{override}: this option is now {OPTIONS[override]}")


def _parsed(override: str) -> Override:
    try:
        return OverridesParser.create().parse_overrides([as_typed(override)])[0]
    except OverrideParseException as error:
        raise UserError(
            f"{override}: cannot be read as name=value; close each bracket and quote, and quote special "
            "characters, such as 'name=\"a b, c\"'"
        ) from error


ONE_RUN = (
    "a job trains one model; start one job per value, such as: "
    "for lr in 1e-3 2e-3; do launch/local.sh name=lr-$lr optim.lr=$lr; done"
)


def explain(error: Exception, overrides: list[str]) -> UserError:
    """Return one message that names the field, for an error that Hydra or OmegaConf raised while composing.

    Args:
        error: the exception; `check_command_line` has accepted the overrides.
        overrides: the command line's arguments; the message quotes the wrong one.
    """
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").partition("/")
        options = options_of(group)
        near = difflib.get_close_matches(option, options, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return UserError(f"{group}={option}: there is no such option; {hint}one of {', '.join(options)}")
    reason = error.__cause__ if isinstance(error, ConfigCompositionException) else error
    if not isinstance(reason, OmegaConfBaseException) or not reason.full_key:
        return UserError(" ".join(str(error).split()))
    key = str(reason.full_key).partition("[")[0]  # an item of a list is its field's
    override = next((o for o in overrides if names_key(o, key)), None)
    if key not in field_types():
        return UserError(unknown_key(key, override))
    hint_type = field_types()[key]
    if isinstance(hint_type, type) and issubclass(hint_type, Enum):
        values = ", ".join(member.value for member in hint_type)
        return UserError(f"{override or key}: must be one of {values}")
    hint = ""
    value = override.split("=", 1)[1] if override else ""
    if hint_type is int and re.fullmatch(r"[\d.]+e\+?\d+", value) and float(value) <= TOKENS:
        hint = f"; write it out: {key}={float(value):_.0f}"
    right = (
        f"must be {_kind(hint_type)}" if isinstance(reason, ValidationError) else str(reason).splitlines()[0]
    )
    return UserError(f"{override or key}: {right}{hint}")


def _kind(hint: Any) -> str:
    """Return what a field's value must be, in words."""
    parts = typing.get_args(hint)
    if type(None) in parts:
        return " or ".join([*(_kind(part) for part in parts if part is not type(None)), "null"])
    if parts:
        return f"a list in brackets (each item {_kind(parts[0])})"
    return KINDS.get(hint, "set field by field")


def names_key(override: str, key: str) -> bool:
    """Return whether an override sets or deletes this key, or something in it."""
    name = override.lstrip("+~").partition("=")[0]
    return name == key or name.startswith(f"{key}.")
