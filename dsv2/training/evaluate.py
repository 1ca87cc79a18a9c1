"""Loss on a fixed validation set, and text from the model.

Shapes: N validation sequences, S tokens a sequence.
"""

from typing import NamedTuple

import numpy as np
import torch

from data.streams.base import Batch
from data.streams.sources import source_of
from dsv2.config.schema import Config
from dsv2.monitoring.metrics import bits_per_byte
from dsv2.parallel.plan import Dim
from dsv2.training.engine import Engine


class Evaluation(NamedTuple):
    loss: float  # nats a token
    bpb: float  # bits per UTF-8 byte of the predicted text


class Evaluator:
    """The validation set and the tokenizer, loaded once."""

    def __init__(self, engine: Engine, config: Config):
        self.engine, self.config = engine, config
        source = source_of(config.data)
        self.sequences = source.validation(config.data, config.model.vocab_size, config.eval.sequences)
        self.token_bytes = source.token_bytes(config.data)
        self.tokenizer = source.tokenizer(config.data)

    def evaluate(self) -> Evaluation:
        """Mean cross-entropy over all labels of the validation sequences; nothing is dropped. Collective.

        Ranks take turns; where N does not divide, a rank without a sequence runs one that does not
        count, for every rank must take part in the experts' exchange.
        """
        mesh, size = self.engine.mesh, self.config.runtime.micro_batch_size
        ranks = mesh[Dim.dp]
        sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)  # nats, labels, bytes
        for start in range(0, len(self.sequences), size * ranks.size):
            places = start + ranks.rank * size + np.arange(size)
            counts = places < len(self.sequences)
            tokens = torch.from_numpy(self.sequences[np.where(counts, places, 0)])
            losses = self.engine.lm_losses(Batch(tokens[:, :-1], tokens[:, 1:], torch.from_numpy(places)))
            labels = tokens[torch.from_numpy(counts), 1:].numpy()
            here = losses[torch.from_numpy(counts).to(mesh.device)].double().sum()
            sums[0] += here
            sums[1] += labels.size
            sums[2] += int(self.token_bytes[labels].sum())
        nats, n_labels, n_bytes = ranks.sum(sums).tolist()
        return Evaluation(nats / n_labels, bits_per_byte(nats, int(n_bytes)))

    def sample(self, temperature: float = 0.8) -> str:
        """`eval.sample_tokens` tokens that continue `eval.sample_prompt`; a fixed seed. Collective.

        Every rank runs the forward, for the experts are spread over them; rank 0 draws.
        """
        generator = torch.Generator().manual_seed(0)
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(self.config.eval.sample_prompt)]
        for _ in range(self.config.eval.sample_tokens):
            recent = torch.tensor([ids[-self.config.data.sequence_length :]])
            logits = self.engine.logits(recent)[0, -1, : self.tokenizer.vocab_size].cpu()
            token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
            token = self.engine.mesh[Dim.world].from_main(token)
            if int(token) == self.tokenizer.eos_id:
                break
            ids.append(int(token))
        return self.tokenizer.decode(ids[1:])
