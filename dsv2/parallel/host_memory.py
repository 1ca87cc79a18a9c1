"""How much of this machine's memory new processes may use. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

OWN_GROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def free_host_memory() -> int:
    """Return the bytes available on the machine, or left in this process's control group if fewer."""
    import psutil

    return min([psutil.virtual_memory().available, *room_in_groups(OWN_GROUPS, CGROUPS)])


def room_in_groups(groups: Path, root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group that limits this process, of version 1 and 2.

    Args:
        groups: the process's list of groups, such as /proc/self/cgroup. Without it there are no limits.
        root: where the groups are mounted.
    """
    if not groups.is_file():
        return
    for line in groups.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _rooms(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _rooms(root / "memory", path, *names)


def _rooms(root: Path, path: str, limit: str, usage: str, cached: str) -> Iterator[int]:
    """Yield the room in a group and in every group around it. The kernel frees cached files if needed."""
    inner = root / path.lstrip("/")
    for folder in (inner, *inner.parents):
        bytes_allowed = _number(folder / limit)
        bytes_used = _number(folder / usage)
        if bytes_allowed is not None and bytes_used is not None:
            yield max(0, bytes_allowed - bytes_used + _statistic(folder / "memory.stat", cached))
        if folder == root:
            return


def _number(file: Path) -> int | None:
    """Return the number in a file; None if the file is missing, or says `max`."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
