"""Draw tokens for several prompts at once, each as if it were alone."""

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

    def draw(self, logits_vocab: Tensor, generator: torch.Generator) -> int:
        """Return the id of one token, drawn by its fp32 logits [vocab] on the CPU."""
        if self.temperature == 0:
            return int(logits_vocab.argmax())
        # The largest logit is subtracted first: otherwise a temperature near 0 would overflow.
        shares_vocab = ((logits_vocab.double() - logits_vocab.max()) / self.temperature).softmax(dim=-1)
        shares_vocab, ids_vocab = shares_vocab.sort(descending=True, stable=True)
        before_vocab = shares_vocab.cumsum(dim=-1) - shares_vocab
        shares_vocab = shares_vocab.masked_fill(before_vocab >= self.top_p, 0.0)  # the first always stays
        return int(ids_vocab[torch.multinomial(shares_vocab, 1, generator=generator)])


def generate(
    model: DeepseekV2,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    eos_id: int,
    vocab_size: int,
) -> Iterator[list[int | None]]:
    """Decode all prompts together. Yield each step's next id of every sequence, None after its end.

    Args:
        model: in eval mode, with all experts.
        prompts: ids, at least one each.
        max_tokens: at most this many steps; fewer if all sequences have drawn `eos_id`.
        vocab_size: number of ids in the tokenizer; the model may have embeddings for more.
    """
    device = model.lm_head.weight.device
    lengths = [len(prompt) for prompt in prompts]
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    ended = [False] * len(prompts)
    logits_B_vocab, cache = prefill(
        model,
        torch.tensor(padded, device=device),
        torch.tensor(lengths, device=device),
        max(lengths) + max_tokens,
    )
    for step in range(max_tokens):
        logits_B_vocab = logits_B_vocab[:, :vocab_size].cpu()
        ids = [sampling.draw(row, own) for row, own in zip(logits_B_vocab, generators, strict=True)]
        ended = [was or token == eos_id for was, token in zip(ended, ids, strict=True)]
        yield [None if over else token for over, token in zip(ended, ids, strict=True)]
        if all(ended) or step == max_tokens - 1:
            return
        logits_B_vocab = decode(model, torch.tensor(ids, device=device), cache)
