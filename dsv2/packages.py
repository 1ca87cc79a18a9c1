"""Packages that requirements.txt does not bring: are they there, in the versions the code is written for?"""

import shlex
import sys
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

CUTE = {"flash-attn-4": "==4.0.0b36", "quack-kernels": "==0.6.5"}  # of runtime.kernels=fused_cute


def installed(package: str) -> str | None:
    """Its version, None if it is not there."""
    return next((d.version for d in metadata.distributions(name=package)), None)


def misfit(requires: dict[str, str], alone: tuple[str, ...] = ()) -> str | None:
    """What is wrong with the first package that does not fit, and how to install all such; else None.

    Args:
        requires: the specifier of each package's version, such as ==0.3.0.
        alone: those to install without what they ask for themselves.
    """
    found = {package: installed(package) for package in requires}
    wrong = [p for p, wanted in requires.items() if not _fits(found[p], wanted)]
    if not wrong:
        return None
    first = wrong[0]
    what = f"is {found[first]}, must be {requires[first]}" if found[first] else "is not installed"
    commands = []
    for option in ("", "--no-deps "):
        some = [shlex.quote(p + requires[p]) for p in wrong if (p in alone) is bool(option)]
        if some:
            commands.append(f"{shlex.quote(_python())} -m pip install {option}{' '.join(some)}")
    return f"{first} {what}; {' && '.join(commands)}"


def _fits(found: str | None, wanted: str) -> bool:
    return found is not None and SpecifierSet(wanted).contains(found, prereleases=True)


def _python() -> str:
    """The interpreter that runs this, from the working folder if it is within."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
