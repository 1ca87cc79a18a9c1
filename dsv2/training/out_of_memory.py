"""Explain that memory has run out, with one message instead of torch's traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from dsv2.config.schema import Config
from dsv2.errors import UserError
from dsv2.parallel.environment import launched_ranks


@contextmanager
def memory_explained(config: Config) -> Iterator[None]:
    """If memory runs out, say which settings need less memory.

    Raises:
        UserError: instead of torch.OutOfMemoryError (a GPU) and MemoryError (Python and NumPy). A failed
            allocation of torch on the CPU is a plain RuntimeError. It names the size and passes through.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (shortage := _shortage(error)) is None:
            raise
        parallel = config.parallel
        raise UserError(
            f"out of memory on rank {launched_ranks()[0]}{shortage}, with runtime.micro_batch_size="
            f"{config.runtime.micro_batch_size} of data.sequence_length={config.data.sequence_length}, "
            f"expert_parallel_size={parallel.expert_parallel_size}, zero_stage={parallel.zero_stage}. Use a "
            "smaller micro-batch, runtime.recompute=true, more ranks or a smaller model. "
            "`python -m dsv2 plan gpus=N` with the same overrides prints how much memory a layout needs."
        ) from error


def _shortage(error: Exception) -> str | None:
    """Return what ran out, as words to append; None for any other error."""
    if isinstance(error, MemoryError):
        return " (CPU)"
    import torch  # not above: `--help` does not need it, and whoever raised the error has imported it

    if isinstance(error, torch.OutOfMemoryError):
        # The first sentences say what was asked for and how much the GPU has; the rest is advice.
        return f" (GPU: {'. '.join(str(error).split('. ')[:3]).rstrip('.')})"
    return None
