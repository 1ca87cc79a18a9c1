"""The fused kernels in training: a loss curve like the reference's, and a host that never waits."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv2.config.schema import OptimConfig, ParallelConfig, Precision, RuntimeConfig
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.execution import Execution
from tests.gpu.process import FUSED_KERNELS, SIZES, alone, kernel_set, need
from tests.unit.helpers import tiny_config

pytestmark = pytest.mark.gpu
STEPS, SEQUENCES, LENGTH = 50, 8, 96


def loss_curve(kernels: str, precision: Precision) -> list[float]:
    """Losses of the engine on text that repeats itself, so that there is something to learn."""
    from data.streams.base import Batch
    from dsv2.parallel.plan import ParallelPlan
    from dsv2.parallel.start import end_process_group, start_mesh
    from dsv2.training.build import build_model
    from dsv2.training.engine import Engine

    mesh = start_mesh(ParallelPlan(), 0, torch.device("cuda", 0))
    runtime = RuntimeConfig(micro_batch_size=SEQUENCES, precision=precision, kernels=kernels)
    model = build_model(replace(tiny_config(**SIZES), initializer_range=0.05), runtime, 0, mesh)
    engine = Engine(model, OptimConfig(lr=2e-3), ParallelConfig(), runtime, mesh)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        start = torch.randint(512, (SEQUENCES, 1), generator=generator)
        ids = (start + 7 * torch.arange(LENGTH + 1)) % 512
        numbers = torch.arange(SEQUENCES) + step * SEQUENCES
        losses.append(engine.train_step([Batch(ids[:, :-1], ids[:, 1:], numbers)], lr=2e-3).loss)
    end_process_group()
    return losses


@pytest.fixture(scope="module")
def reference_curves() -> tuple[Tensor, Tensor]:
    """In fp32, and in bf16."""
    fp32, bf16 = (alone(loss_curve, "reference", p) for p in (Precision.fp32, Precision.bf16))
    return torch.tensor(fp32), torch.tensor(bf16)


@FUSED_KERNELS
def test_loss_curve_is_the_references_within_the_noise_of_bf16(reference_curves, kernels):
    """No further from fp32 than plain torch in bf16 is, twice over, and both learn."""
    need(kernels)
    exact, plain = reference_curves
    fused = torch.tensor(alone(loss_curve, kernels, Precision.bf16))
    noise = (plain - exact).square().mean().sqrt()
    print(f"rms from fp32: reference in bf16 {noise:.2e}, fused {(fused - exact).square().mean().sqrt():.2e}")
    assert exact[-1] < 0.8 * exact[0], "it learns, so that there is a curve to follow"
    assert (fused - exact).square().mean().sqrt() < 2 * noise + 1e-3
    torch.testing.assert_close(fused[:3], exact[:3], rtol=2e-3, atol=0)


@FUSED_KERNELS
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_host_never_waits_within_the_model(dropping, recompute, kernels):
    """One rank: forward and backward of all layers are queued without a look at the device."""
    config = tiny_config(**SIZES)
    config.balance.token_dropping = dropping
    model = DeepseekV2(config, Execution(recompute=recompute, kernels=kernel_set(kernels)))
    init_weights(model, 0.05, seed=0)
    model = model.bfloat16().cuda().train()
    ids = torch.randint(512, (2, SEQUENCES, LENGTH), device="cuda")
    numbers = torch.arange(SEQUENCES, device="cuda")

    def step() -> None:
        model(ids[0], ids[1], numbers).loss.backward()

    step()  # compiles
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode calls itself a prototype
            torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
