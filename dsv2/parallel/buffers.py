"""The buffers of a model that belong to its checkpoint: the ones registered as persistent."""

from torch import Tensor, nn


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's persistent buffers by name."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
