"""Numbers, rates and durations as text for people."""

import math

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def fmt_count(number: float) -> str:
    """Return a count or a rate as text: 812, 9.5, 12.3K, 3.2M, 15.7B, 1.5T."""
    if not math.isfinite(number):
        return str(number)
    for size, suffix in _SUFFIXES:
        # 999,950 rounds up to 1000.0K, so it already belongs to the larger unit.
        if abs(number) >= size * 0.99995:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}" if number == round(number) or abs(number) >= 99.95 else f"{number:.1f}"


def fmt_time(seconds: float | None) -> str:
    """Return a duration as text: h:mm:ss, 2d 03:04:05 from one day on, "?" for None, NaN or infinity."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def short(number: float) -> str:
    """Return a size with two or three digits, such as 37.7M or 8.10T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            digits = 2 if number < 10 * size else 1
            return f"{number / size:.{digits}f}{unit}"
    return f"{number:.0f}"
