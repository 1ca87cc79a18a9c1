"""The overrides that follow from the number of processes. `train` and `check` append them."""

from typing import NamedTuple

QUICKSTART = "experiment=quickstart"
QUICKSTART_BATCH = 8  # sequences


class Adjusted(NamedTuple):
    overrides: list[str]  # the user's overrides, then the appended ones
    notes: list[str]  # a line for each appended override, because the user might not expect it


def is_quickstart(overrides: list[str], machines: int = 1) -> bool:
    """Return whether these overrides start the quickstart on one machine."""
    return QUICKSTART in overrides and machines == 1


def adjust(overrides: list[str], processes: int, machines: int = 1) -> Adjusted:
    """Append the overrides that this many processes per machine need, unless the user has set the field."""
    notes: list[str] = []
    appended: list[str] = []

    def is_set(field: str) -> bool:
        return any(f"{field}=" in word for word in overrides)

    if processes * machines == 1 and not is_set("parallel.expert_parallel_size"):
        notes.append("one process: appending parallel.expert_parallel_size=1, whatever the experiment says")
        appended.append("parallel.expert_parallel_size=1")
    if is_quickstart(overrides, machines) and processes in (4, 8) and not is_set("runtime.micro_batch_size"):
        share = f"runtime.micro_batch_size={QUICKSTART_BATCH // processes}"
        notes.append(f"quickstart: appending {share}, one process's share of the batch")
        appended.append(share)
    return Adjusted([*overrides, *appended], notes)
