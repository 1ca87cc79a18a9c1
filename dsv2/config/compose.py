"""From Hydra's composed configuration to `Config`, and from its errors to one clear message."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv2.config.renamed import FIELDS, OPTIONS, with_new_names
from dsv2.config.schema import Config
from dsv2.errors import UserError

CONF = Path(__file__).parents[2] / "conf"
# What a value that must be given looks like.
_WANTED = {"data.path": "FOLDER with a folder that `python -m data.prepare` wrote"}


def register_schema() -> None:
    """Make the dataclasses known to Hydra as the node `schema`, which conf/config.yaml starts from."""
    ConfigStore.instance().store(name="schema", node=Config)


def compose_overrides(overrides: list[str]) -> DictConfig:
    """`conf/` under these overrides, for command lines that are not Hydra's own.

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
    """The typed configuration.

    Raises:
        UserError: a key that no field has (Hydra itself lets `+key=value` through), or a field
            without a value.
    """
    _check_keys(composed)
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise UserError(f"{missing[0]}: must be given, as {missing[0]}={_WANTED.get(missing[0], 'VALUE')}")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def compose_config(overrides: list[str]) -> Config:
    """The configuration that train.py would have under these overrides; for other command lines.

    Raises:
        UserError: one message for whatever is wrong with them.
    """
    composed = compose_overrides(overrides)
    try:
        return to_config(composed)
    except COMPOSITION_ERRORS as error:
        raise explain(error, overrides) from None


def check_shown(arguments: list[str]) -> None:
    """Refuse unknown keys with `--cfg`, which Hydra answers by itself.

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
    """The configuration as plain dicts, lists, numbers and strings."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def from_plain(plain: dict[str, Any]) -> Config:
    """What `to_plain` made, typed again; a field that it lacks, being of an older version, has its default.

    Raises:
        UserError: a field that there is not, or a value of the wrong type.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), with_new_names(plain)))
    except OmegaConfBaseException as error:
        raise UserError(
            f"a saved configuration does not fit this version: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(config, Config)
    return config


# They say where a run is and how far it goes this time, not how it trains.
_OF_THE_CALL = {"name", "runs_dir", "resume", "new_stage", "init_from", "stop_step"}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each option whose value is another now, as `optim.lr 0.001 -> 0.0005`, values as overrides have them.

    Args:
        before: what `to_plain` made, maybe by an older version; a field that it lacks had its default.
        now: what `to_plain` made.
    """
    old, new = _flat(to_plain(Config())) | _flat(with_new_names(before)), _flat(now)
    names = [name for name in dict.fromkeys([*new, *old]) if name not in _OF_THE_CALL]
    values = [(name, old.get(name), new.get(name)) for name in names]
    unused = {"seed": " (which only the first weights depend on)"}
    return [f"{n} {_written(a)} -> {_written(b)}{unused.get(n, '')}" for n, a, b in values if a != b]


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in plain.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def field_types() -> dict[str, Any]:
    """Every field's dotted name and its type; sections are included."""

    def walk(cls: type, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, hint in typing.get_type_hints(cls).items():
            found[prefix + name] = hint
            for part in (hint, *typing.get_args(hint)):  # a section may be `Section | None`
                if dataclasses.is_dataclass(part):
                    found |= walk(typing.cast(type, part), f"{prefix}{name}.")
        return found

    return walk(Config, "")


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in node:
        keys.append(f"{prefix}{name}")
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            keys += _keys(child, f"{prefix}{name}.")
    return keys


SHORT = {  # what the planner calls these fields
    "ep": "parallel.expert_parallel_size",
    "zero": "parallel.zero_stage",
    "micro_batch": "runtime.micro_batch_size",
}


def unknown_key(key: str, given: str | None = None, words: Collection[str] = ()) -> str:
    """The message for a key that no field has, with the nearest field that exists.

    Args:
        key: dotted name.
        given: the override as it was written, where it is known.
        words: further keys that the command line takes.
    """
    if key in FIELDS:
        return f"{given or key}: this field is now {FIELDS[key]}"
    names = [*words, *field_types()]
    last = key.split(".")[-1]
    near = [SHORT[key]] if key in SHORT else difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    if not near:  # the right name in the wrong section, such as lr for optim.lr
        leaf = difflib.get_close_matches(last, [n.split(".")[-1] for n in names], n=1, cutoff=0.7)
        near = [n for n in names if leaf and n.split(".")[-1] == leaf[0]]
    hint = f"did you mean {near[0]}?" if near else "see train.py --cfg job for the fields there are"
    if last in ("steps", "max_steps", "num_steps", "train_steps", "epochs", "max_epochs"):  # as others say
        hint = "optim.total_tokens is how long, stop_step stops earlier"
    return f"{given or key}: there is no such field; {hint}"


# What composing and converting a configuration raise for mistakes in it.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)


def check_command_line(overrides: list[str], hydras_own: bool = False) -> None:
    """Refuse `model=null`, `+optim=1` and the like, which Hydra answers with a traceback, and sweeps.

    Options such as --cfg job, and their words, are let through where the command line is `hydras_own`.
    """
    asks_hydra = hydras_own and any(override.startswith("-") for override in overrides)
    for override in overrides:
        if override in ("-m", "--multirun"):
            raise UserError(f"{override}: {ONE_RUN}")
        name = override.removeprefix("--").split("=")[0]
        if override.startswith("--") and (name == "experiment" or name in field_types()):
            right = f"{name}={override.partition('=')[2] or 'VALUE'}"
            raise UserError(f"{override}: must be written without dashes, such as {right}")
        as_option = override.startswith("-") or ("=" not in override and not override.startswith("~"))
        if as_option and not asks_hydra:
            raise UserError(f"{override}: must be written as name=value, such as experiment=quickstart")
        if override in OPTIONS:
            raise UserError(f"{override}: this option is now {OPTIONS[override]}")
        found = re.fullmatch(r"[+~]*(model|rope_scaling|data|optim|runtime|logging)=(.*)", override)
        if found and (override[0] in "+~" or not re.fullmatch(r"(?!null$)[A-Za-z]\w*", found[2])):
            raise UserError(f"{override}: must name a file of conf/{found[1]}, without .yaml")
        if re.match(r"\+*model\.rope_scaling(\.\w+)?=(?!null$)", override) and not any(
            re.match(r"rope_scaling=(?!none$)|experiment=", other) for other in overrides
        ):
            raise UserError(f"{override}: plain RoPE has no such field; choose rope_scaling=yarn too")


ONE_RUN = (
    "a job trains one model; start one for each value, such as: "
    "for lr in 1e-3 2e-3; do launch/local.sh name=lr-$lr optim.lr=$lr; done"
)


def options_of(group: str) -> list[str]:
    """What `group=` may be, folders within it too; not what these share, `common.yaml`."""
    files = sorted((CONF / group).rglob("*.yaml"))
    return [f.relative_to(CONF / group).with_suffix("").as_posix() for f in files if f.stem != "common"]


def explain(error: Exception, overrides: list[str]) -> UserError:
    """One message, naming the field, for what Hydra and OmegaConf raise while composing.

    Args:
        error: the exception.
        overrides: the command line's arguments, to quote the one at fault.
    """
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").partition("/")
        options = options_of(group)
        near = difflib.get_close_matches(option, options, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return UserError(f"{group}={option}: there is no such option; {hint}one of {', '.join(options)}")
    text = f"{error}\n{error.__cause__ or ''}"
    if "--multirun" in text:
        return UserError(f"{next((o for o in overrides if ',' in o), 'overrides')}: {ONE_RUN}")
    found = re.search(r"Could not override '([^'@]+)", text) or re.search(r"full_key: (\S+)", text)
    if found is None:
        return UserError(" ".join(str(error).split("\nSee https")[0].split()))
    key = re.sub(r"\[\d+\]$", "", found.group(1))  # an item of a list is its field's
    given = next((o for o in overrides if o.lstrip("+~").startswith(f"{key}=")), None)
    if key not in field_types():
        return UserError(unknown_key(key, given))
    reason = str(error.__cause__ or error).splitlines()[0].split("composing config: ")[-1]
    expected = _type_name(field_types()[key])
    hint = ""
    if expected == "int" and given and re.fullmatch(r"[\d.]+e\+?\d+", value := given.split("=", 1)[1]):
        hint = f"; write it out: {key}={float(value):_.0f}"
    return UserError(f"{given or key}: {reason} (expected {expected}{hint})")


def _type_name(hint: Any) -> str:
    return str(hint) if typing.get_args(hint) else hint.__name__
