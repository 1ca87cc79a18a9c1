"""The planner's tables for the fused kernels against what these keep and take, on CPU."""

from itertools import product

import pytest
import torch

from dsv2.config.schema import ModelConfig
from dsv2.kernels.specs import find_spec
from dsv2.model import head_memory
from dsv2.model.head_memory import head
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.execution import Execution
from dsv2.moe.memory import moe
from dsv2.parallel.micro_batch import MicroBatch
from dsv2.planner.activations import activations
from tests.idle_triton import idle_triton
from tests.live import LiveMemory
from tests.unit.helpers import tiny_config

SEQUENCES, LENGTH = 2, 128
TOKENS = SEQUENCES * LENGTH
# torch's grouped product wants rows of whole 16 bytes.
BASE = {"v_head_dim": 14, "hidden_size": 64, "moe_intermediate_size": 48, "intermediate_size": 160}
SHAPES = {
    "base": {},
    "wide vocabulary": {"vocab_size": 3000},
    "no query compression, many heads": {"q_lora_rank": None, "num_attention_heads": 12},
    "very many heads": {"num_attention_heads": 64},
    "no shared experts": {"n_shared_experts": 0},
    "many shared experts": {"n_shared_experts": 24, "num_experts_per_tok": 1},
    "many experts": {"n_routed_experts": 32, "moe_intermediate_size": 96, "num_experts_per_tok": 6},
    "wide experts": {"moe_intermediate_size": 192},
}
CHUNKS = {"one chunk": 8192, "chunks": 60}


def config(shape: str) -> ModelConfig:
    return tiny_config(**(BASE | SHAPES[shape]))


@pytest.fixture
def measured(monkeypatch):
    """(bytes kept by a forward, most bytes during it and its backward, what the planner says)."""

    def run(shape: str, chunk: int, recompute: bool, kind: str) -> tuple[int, int, MicroBatch]:
        monkeypatch.setattr(head_memory, "HEAD_CHUNK", chunk)
        sizes = config(shape)
        ids = torch.randint(0, sizes.vocab_size, (2, SEQUENCES, LENGTH), generator=torch.manual_seed(0))
        with idle_triton(kind, chunk) as kernels:
            model = DeepseekV2(sizes, Execution(recompute=recompute, kernels=kernels)).to(torch.bfloat16)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            known = [t for q in model.parameters() for t in (q, q.grad) if t is not None]
            with LiveMemory(known) as live:
                out = model(ids[0], ids[1], torch.arange(SEQUENCES))
                kept = live.total
                out.loss.backward()
        p = MicroBatch(sizes, TOKENS, 2, 1, recompute, fused_norm=False, kernels=find_spec(kind))
        return kept, live.peak, p

    return run


@pytest.mark.parametrize("kind", ["fused", "fused_cute"])
@pytest.mark.parametrize(("shape", "chunk", "recompute"), [*product(SHAPES, CHUNKS, [False, True])])
def test_kept_and_fullest_moment(measured, shape, chunk, recompute, kind):
    kept, peak, p = measured(shape, CHUNKS[chunk], recompute, kind)
    want = activations(p)
    assert want.kept + sum(head(p).values()) == pytest.approx(kept, rel=0.03), "and rope tables, statistics"
    assert 0.97 < want.peak / peak < 1.03


def test_fused_cute_keeps_no_weight_a_pair():
    """fused multiplies the hidden activations by it, fused_cute the outputs, by the token's slots."""
    p = MicroBatch(config("base"), TOKENS, 2, 1, False, fused_norm=False, kernels=find_spec("fused"))
    kept = [moe(p._replace(kernels=find_spec(name)))["experts: weights"] for name in ("fused", "fused_cute")]
    assert kept[0] - kept[1] == 4 * TOKENS * p.model.num_experts_per_tok
