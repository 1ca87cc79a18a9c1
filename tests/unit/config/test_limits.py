"""Numbers that a loop would never end with or fp32 cannot hold, and layouts that processes cannot have."""

import pytest

from tests.unit.config.test_schema import ABOVE_ZERO, SEEDS, refusal


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("optim.total_tokens", 10**18),
        ("optim.batch_size", 10**6),
        ("optim.batch_ramp_increment", 10**6),
        ("optim.batch_ramp_tokens", 10**18),
        ("model.num_hidden_layers", 2**16),
        ("model.n_routed_experts", 2**16),
        ("model.num_attention_heads", 2**16),
        ("model.n_shared_experts", 2**16),
        ("model.vocab_size", 2**31 - 1),
        ("model.q_lora_rank", 2**31 - 1),
        ("runtime.micro_batch_size", 2**31 - 1),
    ],
)
def test_too_large(name, most):
    """Whatever loops over it must end."""
    assert refusal((name, most + 1)) == f"{name}={most + 1}: must be at most {most}"
    assert refusal((name, 10**23)) == f"{name}={10**23}: must be at most {most}"


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("value", [-1, 2**63, 10**23])
def test_a_seed_has_63_bits(name, value):
    assert refusal((name, value)).startswith(f"{name}={value}: must be ")


@pytest.mark.parametrize("name", ABOVE_ZERO)
@pytest.mark.parametrize("value", [1e-300, 1e39])
def test_must_be_a_number_in_fp32(name, value):
    assert refusal((name, value)) == f"{name}={value}: must lie between 1.2e-38 and 3.4e+38, as in fp32"


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (
            6,
            [("parallel.expert_parallel_size", 4)],
            "parallel.expert_parallel_size=4: must divide the number of processes, 6: one of 1, 2; "
            "or start another number (NPROC=N launch/local.sh, torchrun --nproc_per_node=N; a plan: gpus=N)",
        ),
        (
            3,
            [("parallel.expert_parallel_size", 3)],
            "parallel.expert_parallel_size=3: must divide model.n_routed_experts=16: only 1 fits",
        ),
        (
            4,
            [("parallel.expert_parallel_size", 4), ("model.n_routed_experts", 24), ("model.n_group", 6)],
            "parallel.expert_parallel_size=4: must divide model.n_group=6 or be a multiple of it, so that "
            "no rank holds parts of two groups: one of 1, 2",
        ),
        (
            3,
            [("optim.batch_size", 16)],
            "optim.batch_size=16: must be a multiple of 12 = runtime.micro_batch_size=4 x 3 processes",
        ),
        (
            2,
            [("optim.batch_size_start", 4), ("optim.batch_ramp_tokens", 9)],
            "optim.batch_size_start=4: must be a multiple of 8 = runtime.micro_batch_size=4 x 2 processes",
        ),
        (
            2,
            [("optim.batch_size_start", 8), ("optim.batch_ramp_tokens", 9)],
            "optim.batch_ramp_increment=1: must be a multiple of 8 = runtime.micro_batch_size=4 x 2 "
            "processes",
        ),
    ],
)
def test_impossible_layouts(world_size, changes, message):
    assert refusal(*changes, world_size=world_size) == message
