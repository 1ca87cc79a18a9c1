"""Decoding from the cache against the full forward, which test_transformer.py holds to the paper."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv2.config.schema import BalanceConfig
from dsv2.inference.decode import Cache, decode, prefill
from dsv2.model.init import init_weights
from dsv2.model.sizes import cached_elements
from dsv2.model.transformer import DeepseekV2
from tests.unit.helpers import KINDS, YARN, tiny_config

PROMPTS = [[3, 14, 15, 9, 26, 5], [7], [2, 7, 18, 28]]
STEPS = 8


def make_model(kind: str, **changes: Any) -> DeepseekV2:
    model = DeepseekV2(tiny_config(**KINDS[kind], **changes))
    init_weights(model, 0.3, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # norms far from 1
                p.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(p.numel()))
    return model.eval()


@torch.no_grad()
def full(model: DeepseekV2, ids: list[int]) -> torch.Tensor:
    """Logits [vocab] behind the last token, by one forward over all of them."""
    return model(torch.tensor([ids]), None, torch.zeros(1, dtype=torch.long))[0, -1]


def start(model: DeepseekV2, prompts: list[list[int]], capacity: int = 20) -> tuple[torch.Tensor, Cache]:
    longest = max(map(len, prompts))
    # What lies behind a prompt's end must not matter: it is another token in each row.
    ids = torch.tensor([[*p, *[10 + row] * (longest - len(p))] for row, p in enumerate(prompts)])
    return prefill(model, ids, torch.tensor([len(p) for p in prompts]), capacity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_and_logits_are_those_of_the_full_forward(kind, scaling, dtype):
    """Prompts of three lengths in one batch, each against itself alone and without a cache."""
    model = make_model(kind, rope_scaling=scaling, rope_theta=100.0).to(dtype)
    atol = 1e-4 if dtype is torch.float32 else 1e-5  # rotation, affinities and the experts' sum are fp32
    logits, cache = start(model, PROMPTS)
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(STEPS):
        expected = torch.stack([full(model, text) for text in texts])
        assert expected.abs().max() > 2
        torch.testing.assert_close(logits, expected, atol=atol, rtol=0)
        tokens = logits.argmax(dim=-1)
        assert torch.equal(tokens, expected.argmax(dim=-1))
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        logits = decode(model, tokens, cache)
    assert cache.lengths_B.tolist() == [len(text) for text in texts]
    assert len({tuple(text[-STEPS:]) for text in texts}) == 3, "prompts that matter"


@pytest.mark.parametrize("kind", KINDS)
def test_a_neighbour_changes_nothing(kind):
    """Other neighbours, other tokens behind the end: the same logits up to the order of sums."""
    model = make_model(kind)
    together, cache = start(model, PROMPTS)
    after = decode(model, torch.tensor([1, 2, 3]), cache)
    for row, prompt in enumerate(PROMPTS):
        alone, own = start(model, [prompt])
        torch.testing.assert_close(together[row], alone[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(
            after[row], decode(model, torch.tensor([row + 1]), own)[0], atol=2e-5, rtol=0
        )


BYTES = {  # 3 layers, 2 sequences, 11 places, 4 bytes
    "mla": 3 * 2 * 11 * 4 * (10 + 6),  # c_kv and one turned key
    "mha": 3 * 2 * 11 * 4 * 2 * 3 * 8,  # keys and values of 3 heads
    "gqa": 3 * 2 * 11 * 4 * 2 * 2 * 8,
    "mqa": 3 * 2 * 11 * 4 * 2 * 8,
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_the_cache_occupies(kind):
    """Of the tensors themselves, before and after a step; as many as the formula promises."""
    model = make_model(kind)
    logits, cache = start(model, [[1, 2, 3], [4]], capacity=11)
    for _ in range(2):
        tensors = [tensor for pair in cache.layers for tensor in pair]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert len(storages) == len(tensors) == 2 * 3
        assert sum(storages.values()) == cache.nbytes == BYTES[kind]
        assert all(t._base is None for t in tensors), "no view that keeps something larger alive"
        logits = decode(model, logits.argmax(dim=-1), cache)
    assert cached_elements(model.config) * 4 * 2 * 11 == BYTES[kind]


def sizes_made_by(action: Callable[[], object]) -> set[int]:
    """Elements of every tensor that an operator returns."""
    sizes: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.update(
                x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if hasattr(x, "numel")
            )
            return out

    with Watch():
        action()
    return sizes


def test_mla_decodes_without_a_key_or_value_of_any_head():
    """Nothing has the size of as many heads' keys (nope, or whole) or values as there are cached tokens."""
    model = make_model("mla")
    logits, cache = start(model, PROMPTS)
    places = 3 * 7  # sequences, tokens so far with the new one
    per_head = {places * 3 * width for width in (8, 8 + 6, 5, 8 + 5)}
    ids = torch.zeros(3, 7, dtype=torch.long)
    with torch.no_grad():
        full_forward = sizes_made_by(lambda: model(ids, None, torch.zeros(3, dtype=torch.long)))
    assert per_head <= full_forward, "there they are"
    assert not per_head & sizes_made_by(lambda: decode(model, logits.argmax(dim=-1), cache))


def test_nothing_is_dropped():
    balance = BalanceConfig(token_dropping=True, capacity_factor=0.1, exempt_fraction=0.0)
    dropping, keeping = make_model("mla", balance=balance), make_model("mla")
    ids = torch.tensor(PROMPTS[:1])
    assert dropping.train()(ids, ids, torch.zeros(1).long()).stats.dropped_E.sum() > 0, "it would in training"
    (logits, cache), (expected, other) = (start(m.eval(), PROMPTS) for m in (dropping, keeping))
    assert torch.equal(logits, expected)
    tokens = logits.argmax(dim=-1)
    assert torch.equal(decode(dropping, tokens, cache), decode(keeping, tokens, other))


def test_bf16_follows_fp32():
    model = make_model("mla")
    half = make_model("mla").bfloat16()
    (logits, cache), (rough, half_cache) = start(model, PROMPTS), start(half, PROMPTS)
    assert half_cache.nbytes * 2 == cache.nbytes
    for _ in range(3):
        assert rough.dtype == torch.float32
        assert (rough - logits).norm() < 0.1 * logits.norm()
        tokens = logits.argmax(dim=-1)
        logits, rough = decode(model, tokens, cache), decode(half, tokens, half_cache)
