"""The planner's tables of activations against the tensors that autograd really keeps.

Small sizes, on CPU; `fused_norm=False` counts what torch keeps of an RMSNorm there. Values are as wide as
queries, because the CPU's attention would pad them.
"""

from itertools import product

import pytest
import torch

from dsv2.config.schema import ModelConfig
from dsv2.model.head_memory import head
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.execution import Execution
from dsv2.parallel.micro_batch import MicroBatch
from dsv2.planner.activations import activations
from tests.live import LiveMemory
from tests.unit.helpers import tiny_config

SEQUENCES, LENGTH = 2, 128
TOKENS = SEQUENCES * LENGTH
BASE = {"v_head_dim": 14, "hidden_size": 64, "moe_intermediate_size": 48, "intermediate_size": 160}
GROUPED = {
    "attention": "gqa",
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "v_head_dim": 8,
}
SHAPES = {
    "base": {},
    "wide vocabulary": {"vocab_size": 3000},
    "no query compression, many heads": {"q_lora_rank": None, "num_attention_heads": 12},
    "many shared experts": {"n_shared_experts": 24, "num_experts_per_tok": 1},
    "no shared experts": {"n_shared_experts": 0},
    "two wide dense layers": {"first_k_dense_replace": 2, "intermediate_size": 900},
    "a key for every head": {"attention": "mha", "num_attention_heads": 6, "v_head_dim": 8},
    "a key for two heads": GROUPED,
    "one key": GROUPED | {"attention": "mqa"},
    "many experts": {"n_routed_experts": 32, "moe_intermediate_size": 96, "num_experts_per_tok": 6},
}
DTYPES = [torch.float32, torch.bfloat16]


def build(shape: str, dtype: torch.dtype, recompute: bool) -> tuple[DeepseekV2, MicroBatch]:
    config = tiny_config(**(BASE | SHAPES[shape]))
    model = DeepseekV2(config, Execution(recompute=recompute)).to(dtype)
    init_weights(model, 0.02, 0)
    return model, MicroBatch(config, TOKENS, dtype.itemsize, ep_size=1, recompute=recompute, fused_norm=False)


def batch(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, config.vocab_size, (2, SEQUENCES, LENGTH), generator=torch.manual_seed(0))
    return ids[0], ids[1], torch.arange(SEQUENCES)


def kept_bytes(model: DeepseekV2) -> int:
    """Bytes of the distinct storages that a forward keeps, without the weights'."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*batch(model.config))
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


@pytest.mark.parametrize(("shape", "dtype"), [*product(SHAPES, DTYPES)])
def test_what_the_layers_keep(shape, dtype):
    """To 1 %: what is not in the tables are the rope tables and a few sums a sequence."""
    model, p = build(shape, dtype, recompute=False)
    want = activations(p).kept + sum(head(p).values())
    assert want == pytest.approx(kept_bytes(model), rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputed_layers_keep_their_input_alone(dtype):
    """Hooks do not see inside a checkpoint: the bytes alive after the forward are counted."""
    model, p = build("base", dtype, recompute=True)
    inputs = batch(model.config)
    with LiveMemory(list(model.parameters())) as live:
        out = model(*inputs)
        kept = live.total
    assert out.loss.requires_grad
    want = activations(p).kept + sum(head(p).values())
    assert kept == pytest.approx(want, rel=0.05), "and the rope tables, losses and statistics"


@pytest.mark.parametrize(("shape", "dtype", "recompute"), [*product(SHAPES, DTYPES, [False, True])])
def test_the_fullest_moment(shape, dtype, recompute):
    model, p = build(shape, dtype, recompute)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [t for q in model.parameters() for t in (q, q.grad) if t is not None]
    with LiveMemory(known) as live:
        model(*batch(model.config)).loss.backward()
    assert 0.97 < activations(p).peak / live.peak < 1.08


def test_recomputing_needs_less():
    kept = activations(build("base", torch.float32, False)[1])
    recomputed = activations(build("base", torch.float32, True)[1])
    assert recomputed.peak < 0.6 * kept.peak
    assert recomputed.logits == kept.logits


def test_a_fused_norm_keeps_less():
    p = build("base", torch.bfloat16, False)[1]
    less = activations(p).kept - activations(p._replace(fused_norm=True)).kept
    m = p.model
    assert m.q_lora_rank is not None
    widths = 2 * m.hidden_size + m.kv_lora_rank + m.q_lora_rank
    # In bf16 the input and the normalised input in fp32, in place of the input in bf16.
    assert less == m.num_hidden_layers * TOKENS * widths * (2 * 4 - 2)
