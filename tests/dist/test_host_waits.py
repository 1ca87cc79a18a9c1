"""How often the host looks at numbers that a GPU would have: within a layer once, and never with one rank.

On a GPU each look waits for all that is queued. The fused kernels run idle here (tests/idle_triton.py);
tests/gpu/test_fused_training.py has one rank's real ones under torch's own watch.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv2.config.schema import Precision, RuntimeConfig
from tests.dist import jobs
from tests.idle_triton import idle_triton

SIZES = {"v_head_dim": 16, "hidden_size": 64, "moe_intermediate_size": 16}
# Operations whose result has a size, or is a number, that only the device knows.
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "is_nonzero")


class Looks(TorchDispatchMode):
    """Counts them, by name. New memory holds zeros: a layer that is made anew must drop the same pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if name == "index" else []
        if name in LOOKS or masks or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.seen.append(name)
        out = func(*args, **(kwargs or {}))
        return out.zero_() if name in ("empty", "new_empty", "empty_like") else out


def looks(rank: int, world_size: int, dropping: bool, recompute: bool, kernels: str) -> tuple[list, list]:
    """Of a forward, and of its backward."""
    from dsv2.parallel.plan import ParallelPlan
    from dsv2.parallel.start import start_mesh
    from dsv2.training.build import build_model

    real = torch.Tensor.tolist
    mesh = start_mesh(ParallelPlan(world=world_size, ep=world_size), rank, torch.device("cpu"))
    runtime = RuntimeConfig(recompute=recompute, kernels=kernels, precision=Precision.bf16)
    config = jobs.model_config(**SIZES, token_dropping=dropping, capacity_factor=0.8)
    batch = jobs.cut(jobs.global_batch(0), rank * 2, 2)
    with idle_triton(kernels, chunk=8192) as idle, Looks() as found:
        with patch("dsv2.training.build.load_kernels", lambda name: idle):
            model = build_model(config, runtime, 0, mesh)
        del found.seen[:]

        def tolist(tensor: torch.Tensor) -> Any:
            found.seen.append("tolist")
            return real(tensor)

        with patch.object(torch.Tensor, "tolist", tolist):
            loss = model(batch.input_ids, batch.labels, batch.sequence_ids).loss
            forward = list(found.seen)
            loss.backward()
    return forward, found.seen[len(forward) :]


@pytest.mark.parametrize("kernels", ["fused", "fused_cute"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_counts_alone_cross_to_the_host(pools, world_size, dropping, recompute, kernels):
    layers = jobs.model_config(**SIZES)
    moe_layers = layers.num_hidden_layers - layers.first_k_dense_replace
    options = {"dropping": dropping, "recompute": recompute, "kernels": kernels}
    once_a_layer = ["tolist"] * (moe_layers if world_size > 1 else 0)
    for forward, backward in pools[world_size].run("tests.dist.test_host_waits:looks", **options):
        assert forward == once_a_layer
        assert backward == (once_a_layer if recompute else [])  # a layer made anew exchanges anew
