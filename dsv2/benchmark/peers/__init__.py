"""Other frameworks that do the same work, one per file, for `python -m dsv2 benchmark --against`.

Each module here is a `Peer`. It imports its framework only in `build`.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

from dsv2.config.schema import Config, ModelConfig, OptimConfig
from dsv2.errors import UserError
from dsv2.hf.fields import check_exportable
from dsv2.packages import installed, misfit

NO_DATA = "none"  # the path that stands for random tokens
PEERS = ("transformers", "deepspeed_autoep", "torchtitan")


class Work(NamedTuple):
    """What a peer trains, on one device."""

    model: ModelConfig
    optim: OptimConfig
    micro_batch: int
    length: int
    seed: int
    device: Any  # torch.device
    dtype: Any  # torch.dtype of weights and activations


class Peer(Protocol):
    """What a module of this folder offers."""

    REQUIRES: dict[str, str]  # the packages it needs, with the versions it is written for
    ALONE: tuple[str, ...]  # the packages of REQUIRES to install without their dependencies
    STATES: str | None  # precision of the optimizer's states; None: the same as the weights'
    ABOUT: str  # one line on how the peer is set up

    def build(self, work: Work) -> Callable[[list[Any]], float]:
        """Return a function that trains one step on a micro-batch of tokens and returns the loss.

        The step is forward, loss, backward, clipping and AdamW.
        """
        ...


def adapter(name: str) -> Peer:
    """Return the peer of that name."""
    return cast(Peer, importlib.import_module(f"dsv2.benchmark.peers.{name}"))


def version(name: str) -> str | None:
    """Return the version of the peer's first package."""
    return installed(next(iter(adapter(name).REQUIRES)))


def parse(text: str) -> dict[str, int | None]:
    """Return each peer of `transformers,deepspeed_autoep:6` with its micro-batch size.

    A size of None stands for the configuration's micro-batch size.

    Raises:
        UserError: a peer does not exist or is given twice, or a micro-batch size is no positive number.
    """
    sizes: dict[str, int | None] = {}
    for item in text.split(","):
        name, colon, size = item.strip().partition(":")
        if name not in PEERS:
            raise UserError(f"--against {text}: there is no peer {name!r}; one of {', '.join(PEERS)}")
        if name in sizes:
            raise UserError(f"--against {text}: {name} is given twice")
        if colon and not re.fullmatch(r"[1-9]\d*", size):
            raise UserError(f"--against {text}: {item} must be a peer and its micro-batch, as {name}:6")
        sizes[name] = int(size) if colon else None
    return sizes


def check_peers(text: str, config: Config, world_size: int) -> dict[str, int | None]:
    """Check every peer of `text`; return what `parse` returns."""
    sizes = parse(text)
    for name in sizes:
        check(name, config, world_size)
    return sizes


def check(name: str, config: Config, world_size: int) -> None:
    """Refuse a peer that is not installed, or work that it cannot do.

    Raises:
        UserError: says what to install, or which field must change.
    """
    peer = adapter(name)
    if wrong := misfit(peer.REQUIRES, peer.ALONE):
        raise UserError(f"--against {name}: {wrong}")
    check_exportable(config.model)
    for fits, field, value, reason in (
        (world_size == 1, "torchrun", world_size, "peers run as one process"),
        (
            config.optim.batch_size == config.runtime.micro_batch_size,
            "optim.batch_size",
            config.optim.batch_size,
            "a peer's step is one micro-batch; leave it out",
        ),
        (
            config.data.path == NO_DATA,
            "data.path",
            config.data.path,
            "peers train on random tokens; leave it out",
        ),
        (
            not config.runtime.recompute,
            "runtime.recompute",
            "true",
            "peers do not recompute; leave it out",
        ),
    ):
        if not fits:
            raise UserError(f"--against {name}: {field}={value}: {reason}")
