"""AdamW on a stretch of a parameter: torch's own where states are fp32, unbiased where they are bf16."""

import pytest
import torch

from dsv2.kernels.reference.adamw import adamw, random_bits, round_stochastically
from dsv2.kernels.types import AdamWStep

HYPER = AdamWStep(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=1, seed=7)
CPU = torch.device("cpu")


def state(count: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Weights and the two moments at the start."""
    weights = torch.randn(count, generator=torch.manual_seed(seed)).to(dtype)
    return [weights, torch.zeros(count, dtype=dtype), torch.zeros(count, dtype=dtype)]


def test_fp32_states_follow_torch_s_adamw():
    ours = state(500, torch.float32)
    theirs = torch.nn.Parameter(ours[0].clone())
    optimizer = torch.optim.AdamW([theirs], lr=HYPER.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    copy = torch.empty(500, dtype=torch.bfloat16)
    for step in range(1, 21):
        gradient = torch.randn(500, generator=torch.manual_seed(step))
        adamw(
            *ours, gradient, scale=torch.tensor(0.25), weight=copy, hyper=HYPER._replace(step=step), first=0
        )
        theirs.grad = gradient * 0.25
        optimizer.step()
        torch.testing.assert_close(ours[0], theirs.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(copy, ours[0].bfloat16())
    torch.testing.assert_close(ours[1], optimizer.state[theirs]["exp_avg"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_no_number_changes_nothing(dtype):
    before = state(30, dtype)
    after = [x.clone() for x in before]
    adamw(
        *after, torch.full((30,), torch.inf), scale=torch.tensor(torch.nan), weight=None, hyper=HYPER, first=0
    )
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_rounding_is_to_a_neighbour_and_right_on_average():
    count = 200_000
    for value in (1.001, -1.001, 3e-5, 0.0, 1.0):
        exact = torch.full((count,), value)
        bits = random_bits(HYPER, 0, count, CPU) & 0xFFFF
        rounded = round_stochastically(exact, bits).double()
        neighbours = {value} if exact.bfloat16()[0] == exact[0] else set(rounded.unique().tolist())
        assert len(neighbours) in (1, 2)
        assert min(neighbours) <= exact[0].item() <= max(neighbours)
        gap = max(neighbours) - min(neighbours)
        assert gap <= abs(value) * 2**-7
        # Three standard deviations of a mean of so many coins.
        assert abs(rounded.mean().item() - exact[0].item()) <= 3 * gap / 2 / count**0.5


def test_small_updates_are_not_lost_to_bf16():
    """Each step is a 1600th of the weight, a sixth of what rounding to nearest would let through."""
    weights = state(4000, torch.bfloat16)
    weights[0].fill_(1.0)
    for step in range(1, 401):
        hyper = HYPER._replace(lr=1 / 1600, weight_decay=0.0, step=step)
        adamw(*weights, torch.ones(4000), scale=torch.tensor(1.0), weight=None, hyper=hyper, first=0)
    # 400 steps of 1/1600 downwards
    assert weights[0].double().mean().item() == pytest.approx(0.75, abs=2e-3)
    assert weights[1].double().mean().item() == pytest.approx(1.0, abs=2e-3)
    assert weights[2].double().mean().item() == pytest.approx(1.0, abs=2e-3)


def test_bits_depend_on_the_place_in_the_parameter_alone():
    whole = state(1000, torch.bfloat16)
    gradient = torch.randn(1000, generator=torch.manual_seed(5))
    parts = [x.clone() for x in whole]
    adamw(*whole, gradient, scale=torch.tensor(1.0), weight=None, hyper=HYPER, first=2**33)
    for start, end in ((0, 130), (130, 1000)):
        views = [x[start:end] for x in parts]
        adamw(
            *views,
            gradient[start:end],
            scale=torch.tensor(1.0),
            weight=None,
            hyper=HYPER,
            first=2**33 + start,
        )
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_bits_differ_between_steps_parameters_and_places():
    base = random_bits(HYPER, 0, 1 << 16, CPU)
    others = [
        random_bits(HYPER._replace(step=2), 0, 1 << 16, CPU),
        random_bits(HYPER._replace(seed=8), 0, 1 << 16, CPU),
        random_bits(HYPER, 1, 1 << 16, CPU),
    ]
    for other in others:
        for shift in (0, 16):
            a, b = ((x >> shift) & 0xFFFF for x in (base, other))
            # Correlation of independent values over 65536 places: one standard deviation is 0.004.
            correlation = torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1].item()
            assert abs(correlation) < 0.016
    for bit in range(32):
        assert ((base >> bit) & 1).double().mean().item() == pytest.approx(0.5, abs=0.008)
