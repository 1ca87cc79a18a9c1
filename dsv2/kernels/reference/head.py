"""Output head and cross-entropy."""

import torch.nn.functional as F
from torch import Tensor


def head_loss(hidden_TD: Tensor, weight_vocab_D: Tensor, labels_T: Tensor) -> Tensor:
    """Return the mean cross-entropy per token in nats, fp32 []. The softmax is over fp32 logits."""
    return F.cross_entropy(F.linear(hidden_TD, weight_vocab_D).float(), labels_T)
