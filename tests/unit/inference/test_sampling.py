"""Drawing tokens: shares, ends, and batches of prompts. test_answers.py runs the whole."""

import pytest
import torch

from dsv2.inference.sampling import Sampling, generate
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from tests.unit.helpers import tiny_config


def test_shares_of_drawn_tokens():
    """2000 draws, so 5 standard deviations of a share are at most 0.056; top-p leaves whole tokens out."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(**how: float) -> list[float]:
        draws = torch.tensor([Sampling(**how).draw(logits, generator) for _ in range(2000)])
        return (torch.bincount(draws, minlength=4) / 2000).tolist()

    assert shares(temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.056)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert shares(temperature=0.5) == pytest.approx((squares / squares.sum()).tolist(), abs=0.056)
    # 0.5 and 0.3 reach 0.7; 0.5 alone does not.
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.056)
    assert shares(temperature=1.0, top_p=0.7)[2:] == [0, 0]
    assert shares(temperature=1.0, top_p=0.5) == [1, 0, 0, 0]
    assert shares(temperature=0.0) == [1, 0, 0, 0]
    halves = [Sampling(1.0, 0.5).draw(torch.zeros(2), generator) for _ in range(50)]
    assert halves == [0] * 50, "one half alone reaches 0.5"


def test_a_sequence_ends_with_eos_and_the_others_go_on():
    """A token that only the second sequence draws is taken for eos."""
    model = DeepseekV2(tiny_config())
    init_weights(model, 0.3, 0)
    prompts, how = [[3, 1, 4], [2]], Sampling(temperature=2.0)
    free = list(generate(model.eval(), prompts, 6, how, eos_id=-1, vocab_size=31))
    first, second = (list(ids) for ids in zip(*free, strict=True))
    eos = next(token for token in second[1:] if token not in first)
    kept = second.index(eos)
    assert kept > 0
    steps = list(generate(model, prompts, 6, how, eos, vocab_size=31))
    assert [ids[0] for ids in steps] == first
    assert [ids[1] for ids in steps] == second[:kept] + [None] * (6 - kept)
    alone = list(generate(model, prompts[1:], 6, how, eos, vocab_size=31))
    assert alone == [[token] for token in [*second[:kept], None]], "it stops when all have ended"


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn():
    model = DeepseekV2(tiny_config())
    init_weights(model, 0.3, 0)
    drawn = [generate(model.eval(), [[5, 6]], 12, Sampling(3.0), -1, known) for known in (31, 4)]
    free, few = ([ids[0] for ids in steps] for steps in drawn)
    assert max(free) >= 4
    assert max(few) < 4
