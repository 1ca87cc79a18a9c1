"""What a training run did, put together from its ranks, and when two runs did the same."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor, nn

# What RoutingStats counts, the same however the tokens lie on ranks, and what it adds up of them.
COUNTS, SUMS = ("tokens", "load_E", "dropped_E", "sent_G"), ("token_entropy", "top1")


@dataclass
class Trace:
    """What a training run did; whole parameters, flattened."""

    losses: list[float] = field(default_factory=list)
    lm_losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    balance: list[np.ndarray] = field(default_factory=list)  # [3, L] a step
    first_moment: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # after one step: 0.1 x clipped gradient
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    routing: list[dict[str, np.ndarray]] = field(default_factory=list)  # RoutingStats of all ranks, a step
    kept: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # as `kept_pairs` tells

    @property
    def dropped(self) -> list[float]:
        """Pairs a step, over all layers."""
        return [float(sums["dropped_E"].sum()) for sums in self.routing]


@contextlib.contextmanager
def kept_pairs(model: nn.Module) -> Iterator[dict[tuple[int, int], np.ndarray]]:
    """{(MoE layer, sequence's id): bool [S, K]} of all that the layers decide to keep, while it is open."""
    from dsv2.moe import layer as moe_layer

    kept: dict[tuple[int, int], np.ndarray] = {}
    current = 0

    def enter(index: int) -> None:
        nonlocal current
        current = index

    decide = moe_layer.keep_within_budget
    signature = inspect.signature(decide)

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        keep_TK = decide(*args, **kwargs)
        ids = signature.bind(*args, **kwargs).arguments["sequence_ids_B"].tolist()
        for sequence, keep in zip(ids, keep_TK.unflatten(0, (len(ids), -1)).numpy(), strict=True):
            before = kept.setdefault((current, sequence), keep)
            assert np.array_equal(before, keep), "a recomputed layer chose anew"
        return keep_TK

    layers = [module for module in model.modules() if isinstance(module, moe_layer.MoELayer)]
    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: enter(index))
        for index, layer in enumerate(layers)
    ]
    with patch.object(moe_layer, "keep_within_budget", recorded):
        yield kept
    for hook in hooks:
        hook.remove()


def whole(parts_of_ranks: list[list[tuple[str, int, int, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Put the ranks' ranges together; every element must be there, and owners must agree."""
    full: dict[str, np.ndarray] = {}
    for name, offset, total, values in (part for parts in parts_of_ranks for part in parts):
        target = full.setdefault(name, np.full(total, np.nan, dtype=np.float32))
        here = target[offset : offset + len(values)]
        assert np.isnan(here).all() or np.array_equal(here, values), f"{name}: owners disagree"
        here[:] = values
    for name, values in full.items():
        assert not np.isnan(values).any(), f"{name}: not every element has an owner"
    return full


def assemble(results: list[tuple[Trace, list, list]]) -> Trace:
    """One trace from all ranks' results."""
    trace = results[0][0]
    assert all(other.losses == trace.losses for other, _, _ in results), "ranks report different losses"
    trace.first_moment = whole([moments for _, moments, _ in results])
    trace.weights = whole([weights for _, _, weights in results])
    n_kept = sum(len(other.kept) for other, _, _ in results)
    trace.kept = {key: keep for other, _, _ in results for key, keep in other.kept.items()}
    assert len(trace.kept) == n_kept, "two ranks had the same sequence"
    return trace


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def assert_same_step(got: Trace, want: Trace, floor: float = 0.0, rtol: float = 1e-6) -> None:
    """The first step of two layouts, which is one global batch from equal weights: 1e-6, and every count and
    every kept pair exactly.

    Seen over all layouts of test_invariance.py: 2e-7 of a loss, 7e-7 of a parameter's gradient. A gradient
    whose terms cancel keeps their rounding; `floor` is a share of the whole gradient that is allowed on top.
    `rtol` bounds a parameter's gradient.
    """
    for name in ("losses", "lm_losses", "balance", "grad_norms"):
        np.testing.assert_allclose(getattr(got, name)[0], getattr(want, name)[0], rtol=1e-6, err_msg=name)
    assert_same_routing(got.routing[0], want.routing[0], rtol=1e-6)
    assert got.kept.keys() == want.kept.keys()
    for place, keep in want.kept.items():
        np.testing.assert_array_equal(got.kept[place], keep, err_msg=f"layer, sequence {place}: kept pairs")
    assert got.first_moment.keys() == want.first_moment.keys()
    whole_norm = float(np.linalg.norm([np.linalg.norm(moment) for moment in want.first_moment.values()]))
    for name, moment in want.first_moment.items():
        error = float(np.linalg.norm(got.first_moment[name] - moment))
        assert error <= rtol * np.linalg.norm(moment) + floor * whole_norm, f"gradient of {name}"


def assert_same_routing(got: dict[str, np.ndarray], want: dict[str, np.ndarray], rtol: float) -> None:
    """Counts to the unit, sums within rounding."""
    for name in COUNTS:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    for name in SUMS:
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, err_msg=name)


def assert_same(got: Trace, want: Trace) -> None:
    """Runs of several steps.

    Weights that Adam has moved differ by more than a gradient does, as it divides by a root of tiny squares
    in its first steps, which enlarges rounding; what is computed from them follows.
    """
    assert_same_step(got, want)
    for name, rtol in (("losses", 1e-6), ("lm_losses", 1e-6), ("balance", 2e-6), ("grad_norms", 3e-6)):
        mine, theirs = np.array(getattr(got, name)), np.array(getattr(want, name))
        np.testing.assert_allclose(mine, theirs, rtol=rtol, err_msg=name)
    for mine, theirs in zip(got.routing, want.routing, strict=True):
        assert_same_routing(mine, theirs, rtol=3e-6)
    assert got.weights.keys() == want.weights.keys()
    for name, weights in want.weights.items():
        difference = relative(got.weights[name], weights)
        assert difference < 2e-5, (name, difference)
