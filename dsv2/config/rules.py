"""Checks of single values. Each refuses a value with the name of its field and what would be right."""

import math
from typing import NoReturn

from dsv2.errors import UserError

MOST = 2**31 - 1  # of a size or count: torch's kernels count with 32 bits
MANY = 2**16  # of parts that are counted one by one: layers, heads, experts
TOKENS = 10**18  # of a run: positions in its data are 64-bit numbers
SEEDS = 2**63  # a seed is below this
# fp32 holds numbers between these two without becoming 0 or infinite.
LEAST_FP32 = 1.2e-38
MOST_FP32 = 3.4e38


def refuse(field_name: str, value: object, right: str) -> NoReturn:
    """Raise UserError: `field_name`=`value`: `right`."""
    raise UserError(f"{field_name}={written(value)}: {right}")


def written(value: object) -> str:
    """Return a value as the command line has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def divisors(number: int) -> str:
    """Return the divisors of `number` as text: "1, 2, 4"."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def require_positive(
    section: str, values: object, names: list[str], least: float = 1, most: float = MOST
) -> None:
    """Refuse each named field of a section that is below `least` or above `most`."""
    for name in names:
        value = getattr(values, name)
        if not value >= least:
            refuse(f"{section}.{name}", value, f"must be at least {least}")
        if value > most:
            refuse(f"{section}.{name}", value, f"must be at most {most}")


def require_above_0(section: str, values: object, names: list[str]) -> None:
    """Refuse each named field of a section that is not above 0 and finite, also after rounding to fp32."""
    for name in names:
        value = getattr(values, name)
        if not 0 < value < math.inf:
            refuse(f"{section}.{name}", value, "must be above 0 and finite")
        if not LEAST_FP32 <= value <= MOST_FP32:
            refuse(f"{section}.{name}", value, f"must lie between {LEAST_FP32} and {MOST_FP32}, as in fp32")


def require_fraction(section: str, values: object, names: list[str]) -> None:
    """Refuse each named field of a section that is not between 0 and 1."""
    for name in names:
        if not 0 <= (value := getattr(values, name)) <= 1:
            refuse(f"{section}.{name}", value, "must lie between 0 and 1")


def require_seed(field_name: str, value: int) -> None:
    """Refuse a seed that is negative or has more than 63 bits."""
    if not 0 <= value < SEEDS:
        refuse(field_name, value, "must be from 0 to 2^63 - 1")
