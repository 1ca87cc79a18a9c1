"""Checks of single values. Each refuses a value with the name of its field and what would be right."""

import math
from typing import NoReturn

from dsv2.errors import UserError


def refuse(field_name: str, value: object, right: str) -> NoReturn:
    """Raise UserError: `field_name`=`value`: `right`."""
    raise UserError(f"{field_name}={_written(value)}: {right}")


def _written(value: object) -> str:
    """Return a value as the command line has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def divisors(number: int) -> str:
    """Return the divisors of `number` as text: "1, 2, 4"."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def require_positive(section: str, values: object, names: list[str], least: float = 1) -> None:
    """Refuse each named field of a section that is below `least` or infinite."""
    for name in names:
        value = getattr(values, name)
        if not least <= value < math.inf:
            refuse(f"{section}.{name}", value, f"must be at least {least}")


def require_above_0(section: str, values: object, names: list[str]) -> None:
    """Refuse each named field of a section that is not above 0 and finite."""
    for name in names:
        value = getattr(values, name)
        if not 0 < value < math.inf:
            refuse(f"{section}.{name}", value, "must be above 0 and finite")


def require_fraction(section: str, values: object, names: list[str]) -> None:
    """Refuse each named field of a section that is not between 0 and 1."""
    for name in names:
        if not 0 <= (value := getattr(values, name)) <= 1:
            refuse(f"{section}.{name}", value, "must lie between 0 and 1")
