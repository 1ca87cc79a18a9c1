"""Drawing tokens, for several prompts at once, each as if it were alone.

Shapes: B prompts, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2.inference.decode import decode, prefill
from dsv2.model.transformer import DeepseekV2


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits."""

    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    seed: int = 0  # of each prompt's own generator

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """One token's id; logits fp32 on the CPU."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        # Less the largest one first: a temperature near 0 would overflow.
        shares_V = ((logits_V.double() - logits_V.max()) / self.temperature).softmax(dim=-1)
        shares_V, ids_V = shares_V.sort(descending=True, stable=True)
        before_V = shares_V.cumsum(dim=-1) - shares_V
        shares_V = shares_V.masked_fill(before_V >= self.top_p, 0.0)  # the first always stays
        return int(ids_V[torch.multinomial(shares_V, 1, generator=generator)])


def generate(
    model: DeepseekV2,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    eos_id: int,
    vocab_size: int,
) -> Iterator[list[int | None]]:
    """Decode all prompts together: at each step every sequence's next id, None once it has ended.

    Args:
        model: in eval mode, with all experts.
        prompts: ids, at least one each.
        max_tokens: steps at most; it ends earlier when all sequences have drawn `eos_id`.
        vocab_size: ids the tokenizer knows; the model may have embeddings for more.
    """
    device = model.lm_head.weight.device
    lengths = [len(prompt) for prompt in prompts]
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    ended = [False] * len(prompts)
    logits_BV, cache = prefill(
        model,
        torch.tensor(padded, device=device),
        torch.tensor(lengths, device=device),
        max(lengths) + max_tokens,
    )
    for step in range(max_tokens):
        logits_BV = logits_BV[:, :vocab_size].cpu()
        ids = [sampling.draw(row, own) for row, own in zip(logits_BV, generators, strict=True)]
        ended = [was or token == eos_id for was, token in zip(ended, ids, strict=True)]
        yield [None if over else token for over, token in zip(ended, ids, strict=True)]
        if all(ended) or step == max_tokens - 1:
            return
        logits_BV = decode(model, torch.tensor(ids, device=device), cache)
