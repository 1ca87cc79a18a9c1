"""Loss on a fixed validation set, and a sample of text from the model."""

import math
from typing import NamedTuple

import numpy as np
import torch

from data.streams.base import Batch
from data.streams.sources import source_of
from dsv2.config.schema import Config
from dsv2.parallel.plan import Dim
from dsv2.parallel.progress import Part
from dsv2.training.engine import Engine


class Evaluation(NamedTuple):
    loss: float  # nats per token
    bpb: float  # bits per UTF-8 byte of the predicted text


class Evaluator:
    """The validation set and the tokenizer, loaded once."""

    def __init__(self, engine: Engine, config: Config):
        self.engine = engine
        self.config = config
        source = source_of(config.data)
        self.sequences = source.validation(config.data, config.model.vocab_size, config.eval.sequences)
        self.token_bytes = source.token_bytes(config.data)
        self.tokenizer = source.tokenizer(config.data)
        self._is_first = True  # of this session

    def evaluate(self) -> Evaluation:
        """Return the mean cross-entropy over the validation set's labels; nothing is dropped. Collective.

        The ranks share the sequences. A rank that has none left runs one that does not count, because every
        rank must take part in the experts' exchange.
        """
        mesh = self.engine.mesh
        if self._is_first:
            self._is_first = False
            mesh.print(f"evaluating on {len(self.sequences)} sequences")
        ranks = mesh[Dim.dp]
        size = self.config.runtime.micro_batch_size
        sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)  # nats, labels, bytes
        for start in range(0, len(self.sequences), size * ranks.size):
            mesh.progress.enter(Part.evaluation)
            indices_B = start + ranks.rank * size + np.arange(size)
            counts_B = indices_B < len(self.sequences)
            tokens = torch.from_numpy(self.sequences[np.where(counts_B, indices_B, 0)])  # [B, S + 1]
            losses_BS = self.engine.lm_losses(
                Batch(tokens[:, :-1], tokens[:, 1:], torch.from_numpy(indices_B))
            )
            labels = tokens[torch.from_numpy(counts_B), 1:].numpy()
            sums[0] += losses_BS[torch.from_numpy(counts_B).to(mesh.device)].double().sum()
            sums[1] += labels.size
            sums[2] += int(self.token_bytes[labels].sum())
        nats, n_labels, n_bytes = ranks.sum(sums).tolist()
        return Evaluation(nats / n_labels, bits_per_byte(nats, int(n_bytes)))

    def sample(self, temperature: float = 0.8) -> str | None:
        """Return text that continues `eval.sample_prompt`; None if `eval.sample_tokens` is 0. Collective.

        Every rank runs the forward pass, because the experts are spread over the ranks. Rank 0 draws the
        tokens, with a fixed seed.
        """
        if not self.config.eval.sample_tokens:
            return None
        self.engine.mesh.print(f"drawing a sample of {self.config.eval.sample_tokens} tokens")
        generator = torch.Generator().manual_seed(0)
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(self.config.eval.sample_prompt)]
        for _ in range(self.config.eval.sample_tokens):
            self.engine.mesh.progress.enter(Part.evaluation)
            recent = torch.tensor([ids[-self.config.data.sequence_length :]])
            logits = self.engine.logits(recent)[0, -1, : self.tokenizer.vocab_size].cpu()
            token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
            token = self.engine.mesh[Dim.world].from_main(token)
            if int(token) == self.tokenizer.eos_id:
                break
            ids.append(int(token))
        return self.tokenizer.decode(ids[1:])


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Return bits per UTF-8 byte of a text; `nats` is its summed cross-entropy."""
    return nats / math.log(2) / n_bytes
