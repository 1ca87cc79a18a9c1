"""Two GPUs through NCCL compute what one does: experts apart or together, tokens dropped or not."""

import os
import socket

import pytest
import torch

from dsv2.config import Kernels, OptimConfig, ParallelConfig, Precision
from tests.gpu.process import FUSED_KERNELS, SIZES, alone, need, together
from tests.unit.helpers import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
STEPS, SEQUENCES, LENGTH = 5, 8, 64


def steps(
    rank: int, world_size: int, port: int, ep: int, stage: int, kernels: Kernels, dropping: bool
) -> list[list[float]]:
    """Of every step loss, LM loss, gradient norm, and the balance losses of every layer."""
    from data.stream import Batch
    from dsv2.engine import Engine, build_model
    from dsv2.parallel.deepspeed_moe import start_mesh
    from dsv2.parallel.mesh import end_process_group

    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    mesh, own = start_mesh(torch.device("cuda", rank), rank, world_size, ep), SEQUENCES // world_size
    precision = Precision.fp32 if kernels is Kernels.reference else Precision.bf16
    parallel = ParallelConfig(ep, stage, own, precision, kernels=kernels)
    config = tiny_config(**SIZES)
    config.initializer_range, config.balance.token_dropping = 0.05, dropping
    engine = Engine(build_model(config, parallel, 0, mesh), OptimConfig(lr=1e-3, eps=1e-4), parallel, mesh)
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        ids = torch.randint(SIZES["vocab_size"], (SEQUENCES, LENGTH + 1), generator=generator)
        mine = slice(rank * own, (rank + 1) * own)
        numbers = torch.arange(SEQUENCES) + step * SEQUENCES
        result = engine.train_step([Batch(ids[mine, :-1], ids[mine, 1:], numbers[mine])], lr=1e-3)
        balance = [value for losses in result.balance for value in losses.tolist()]
        found.append([result.loss, result.lm_loss, result.grad_norm, *balance])
    end_process_group()
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(("ep", "stage"), [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_fp32(ep, stage, dropping):
    if dropping and ep == 1:
        pytest.skip("half as many sequences a dispatch: other pairs are dropped")
    one = alone(steps, 0, 1, free_port(), 1, 1, Kernels.reference, dropping)
    two = together(steps, 2, free_port(), ep, stage, Kernels.reference, dropping)
    assert two[0] == two[1]
    torch.testing.assert_close(torch.tensor(two[0]), torch.tensor(one), rtol=2e-5, atol=1e-6)


@FUSED_KERNELS
@pytest.mark.parametrize(("ep", "dropping"), [(1, False), (2, False), (2, True)])
def test_fused_bf16(ep, dropping, kernels):
    need(kernels)
    one = alone(steps, 0, 1, free_port(), 1, 1, kernels, dropping)
    two = together(steps, 2, free_port(), ep, 1, kernels, dropping)
    assert two[0] == two[1]
    got, want = torch.tensor(two[0]), torch.tensor(one)
    # Roundings differ, and with them a few tokens' experts. The gradient's norm shows it most, and more after
    # every update: that of one GPU in fp32 is up to 2 % from that of the same GPU in bf16.
    losses, norms, balance = slice(0, 2), slice(2, 3), slice(3, None)
    torch.testing.assert_close(got[:, losses], want[:, losses], rtol=2e-3, atol=0)
    torch.testing.assert_close(got[:, balance], want[:, balance], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(got[:1, norms], want[:1, norms], rtol=1e-2, atol=0)
    torch.testing.assert_close(got[1:, norms], want[1:, norms], rtol=2.5e-2, atol=0)
