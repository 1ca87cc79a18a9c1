"""Decoding on a GPU follows the CPU's full forward."""

import pytest
import torch

from dsv2.inference.decode import decode, prefill
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from tests.unit.helpers import KINDS, YARN, tiny_config

pytestmark = pytest.mark.gpu


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_logits_are_those_of_the_cpus_full_forward(kind):
    reference = DeepseekV2(tiny_config(**KINDS[kind], rope_scaling=YARN, rope_theta=100.0)).eval()
    init_weights(reference, 0.3, seed=0)
    model = DeepseekV2(reference.config).cuda().eval()
    model.load_state_dict(reference.state_dict())
    texts = [[3, 14, 15, 9, 26], [7, 1]]
    ids, lengths = torch.tensor([texts[0], [*texts[1], 0, 0, 0]]), torch.tensor([5, 2])
    logits, cache = prefill(model, ids.cuda(), lengths.cuda(), capacity=12)
    for _ in range(6):
        for text, got in zip(texts, logits.cpu(), strict=True):
            want = reference(torch.tensor([text]), None, torch.zeros(1, dtype=torch.long))[0, -1]
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
            text.append(int(want.argmax()))
        logits = decode(model, torch.tensor([text[-1] for text in texts]).cuda(), cache)


@torch.no_grad()
def test_bf16_follows_fp32():
    config = tiny_config()
    model = DeepseekV2(config).cuda().eval()
    init_weights(model, 0.3, seed=0)
    half = DeepseekV2(config).cuda().eval()
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    ids, lengths = torch.randint(31, (3, 16)).cuda(), torch.tensor([16, 9, 1]).cuda()
    (logits, cache), (rough, half_cache) = (prefill(m, ids, lengths, 20) for m in (model, half))
    for _ in range(4):
        assert (rough - logits).norm() < 0.1 * logits.norm()
        tokens = logits.argmax(dim=-1)
        logits, rough = decode(model, tokens, cache), decode(half, tokens, half_cache)
