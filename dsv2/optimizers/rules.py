"""The optimizers that optim.name may name."""

from dsv2.config.rules import refuse
from dsv2.optimizers.adamw import AdamW
from dsv2.optimizers.base import Optimizer

OPTIMIZERS: tuple[type[Optimizer], ...] = (AdamW,)


def find_optimizer(name: str) -> Optimizer:
    """Return the optimizer of this name.

    Raises:
        UserError: no optimizer has this name.
    """
    known = {optimizer.name: optimizer for optimizer in OPTIMIZERS}
    if name not in known:
        refuse("optim.name", name, f"must be {' or '.join(known)}")
    return known[name]()
