"""The new names of fields and options that have moved, for messages and for configurations saved earlier."""

from copy import deepcopy
from typing import Any

FIELDS = {
    "parallel.device": "runtime.device",
    "parallel.precision": "runtime.precision",
    "parallel.kernels": "runtime.kernels",
    "parallel.micro_batch_size": "runtime.micro_batch_size",
    "parallel.activation_checkpointing": "runtime.recompute",
    "parallel.optimizer_states": "optim.states",
}
OPTIONS = {"parallel=gpu": "runtime=gpu", "parallel=default": "runtime=default"}


def with_new_names(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a saved plain configuration with every moved field under its new name."""
    renamed = deepcopy(plain)
    for old, new in FIELDS.items():
        old_section, old_name = old.split(".")
        new_section, new_name = new.split(".")
        section = renamed.get(old_section)
        target = renamed.setdefault(new_section, {})
        if isinstance(section, dict) and isinstance(target, dict) and old_name in section:
            target[new_name] = section.pop(old_name)
    return renamed
