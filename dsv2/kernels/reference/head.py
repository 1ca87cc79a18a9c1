"""Output head and cross-entropy.

Shapes: T tokens, D hidden_size, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor


def head_loss(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Mean cross-entropy a token, nats, fp32 []: the softmax is over fp32 logits."""
    return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), labels_T)
