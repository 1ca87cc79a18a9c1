"""List the options that differ between two configurations."""

from typing import Any

from dsv2.config.compose import to_plain
from dsv2.config.renamed import with_new_names
from dsv2.config.schema import Config

# Options that say where a run is and how far this call takes it, but not how it trains.
_OF_THE_CALL = {
    "name", "runs_dir", "resume", "new_stage", "init_from", "stop_step", "logging.project", "profile.steps",
    "profile.ranks",
}  # fmt: skip


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return each option whose value has changed, as `optim.lr 0.001 -> 0.0005`, written as in overrides.

    Args:
        before: a result of `to_plain`, perhaps of an older version. A field that it lacks had its default.
        now: a result of `to_plain`.
    """
    old = _flat(to_plain(Config())) | _flat(with_new_names(before))
    new = _flat(now)
    names = [name for name in dict.fromkeys([*new, *old]) if name not in _OF_THE_CALL]
    values = [(name, old.get(name), new.get(name)) for name in names]
    unused = {"seed": " (only the initial weights depend on it)"}
    return [f"{n} {_written(a)} -> {_written(b)}{unused.get(n, '')}" for n, a, b in values if a != b]


def differing(configs: list[dict[str, Any]]) -> dict[str, list[str | None]]:
    """Return each option whose value differs, with its value in every configuration, as in overrides.

    A value is None if the configuration has no such option, such as YaRN's fields for plain RoPE. A run's
    name and folder are left out: they always differ.

    Args:
        configs: results of `to_plain`.
    """
    flat = [_flat(config) for config in configs]
    names = dict.fromkeys(name for options in flat for name in options if name not in ("name", "runs_dir"))
    values = {
        name: [_written(options[name]) if name in options else None for options in flat] for name in names
    }
    return {name: of_runs for name, of_runs in values.items() if len(set(of_runs)) > 1}


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
