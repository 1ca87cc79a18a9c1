"""Check the versions of optional packages, which requirements.txt does not install."""

import shlex
import sys
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

CUTE = {"flash-attn-4": "==4.0.0b36", "quack-kernels": "==0.6.5"}  # of runtime.kernels=fused_cute


def installed(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    return next((d.version for d in metadata.distributions(name=package)), None)


def misfit(requires: dict[str, str], alone: tuple[str, ...] = ()) -> str | None:
    """Describe the first package that is missing or has the wrong version; return None if all fit.

    The text ends with the pip command that installs every such package.

    Args:
        requires: each package's version specifier, such as ==0.3.0.
        alone: packages to install without their dependencies.
    """
    versions = {package: installed(package) for package in requires}
    wrong = [package for package, wanted in requires.items() if not _fits(versions[package], wanted)]
    if not wrong:
        return None
    first = wrong[0]
    what = f"is {versions[first]}, must be {requires[first]}" if versions[first] else "is not installed"
    commands = []
    for option in ("", "--no-deps "):
        arguments = [shlex.quote(p + requires[p]) for p in wrong if (p in alone) is bool(option)]
        if arguments:
            commands.append(f"{shlex.quote(_python())} -m pip install {option}{' '.join(arguments)}")
    return f"{first} {what}; {' && '.join(commands)}"


def _fits(version: str | None, wanted: str) -> bool:
    return version is not None and SpecifierSet(wanted).contains(version, prereleases=True)


def _python() -> str:
    """Return this interpreter's path, relative to the working folder if it lies inside."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
