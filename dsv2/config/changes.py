"""List the options that differ between two configurations."""

from typing import Any

from dsv2.config.compose import to_plain
from dsv2.config.renamed import with_new_names
from dsv2.config.schema import Config

# Options that say where a run is and how far this call takes it, but not how it trains.
_OF_THE_CALL = {"name", "runs_dir", "resume", "new_stage", "init_from", "stop_step", "logging.project"}


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


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
