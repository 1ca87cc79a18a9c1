"""What a plan counts beside the states and activations that tests/dist/test_plan_memory.py measures."""

from dsv2.planner.memory import memory
from tests.unit.helpers import compose_config


def test_the_symmetric_buffer_counts():
    """Two halves for all tokens of 4 ranks: 2 x 4096 tokens each, rows of 2048 bf16 and 12 fp32 numbers."""
    layout = [
        "experiment=lite",
        "data.path=none",
        "parallel.expert_parallel_size=4",
        "runtime.micro_batch_size=2",
    ]
    usual, symmetric = (
        memory(compose_config(*layout, f"parallel.expert_exchange={exchange}"), 4)
        for exchange in ("collective", "symmetric")
    )
    buffer = 2 * (4 * 2 * 4096) * (2048 * 2 + 12 * 4)
    assert symmetric.step_buffers == usual.step_buffers + buffer
    for phase in ("forward and backward", "gradient reduction", "optimizer step"):
        assert symmetric.phases[phase] == usual.phases[phase] + buffer
