"""The share of each part, from kernels' times."""

import pytest

from dsv2.benchmark.compare import run_turn
from tests.gpu.process import FUSED_KERNELS, need

pytestmark = pytest.mark.gpu


@FUSED_KERNELS
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_kernels_are_attributed_to_parts(recompute, kernels):
    need(kernels)
    options = ["--steps", "2", "--warmup", "2", "model=small", "runtime=gpu", "data.sequence_length=1024"]
    options += [f"runtime.kernels={kernels}"]
    row = run_turn([*options, f"runtime.recompute={recompute}"])
    assert "error" not in row, row
    share = {part: found["share"] for part, found in row["parts"].items()}
    assert sum(share.values()) == pytest.approx(1)
    idle, other = share.pop("idle"), share.pop("other")
    share.pop("gradients")  # one micro-batch of one rank adds nothing up
    assert min(share.values()) > 0, share
    assert 0 <= idle < 1
    assert other < 0.1 * (1 - idle), row["parts"]
