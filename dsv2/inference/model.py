"""A checkpoint's model in one process, for inference."""

from pathlib import Path

import torch

from dsv2.checkpoint.reader import CheckpointReader
from dsv2.model.init import materialize
from dsv2.model.transformer import DeepseekV2
from dsv2.parallel.buffers import persistent_buffers


@torch.no_grad()
def load_model(
    path: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DeepseekV2:
    """Return the model of a checkpoint with its weights and buffers: with all experts, and dropping nothing.

    Memory never holds more than the model in `dtype` and one tensor in fp32.

    Raises:
        UserError: see `CheckpointReader`.
    """
    reader = CheckpointReader(path)
    with torch.device("meta"):
        model = DeepseekV2(reader.config.model)
    materialize(model, dtype, device)
    for name, parameter in model.named_parameters():
        parameter.copy_(reader.tensor(name, parameter.numel()).view_as(parameter))
    for name, buffer in persistent_buffers(model).items():
        buffer.copy_(reader.tensor(name, buffer.numel(), "buffer").view_as(buffer))
    return model.eval()
