"""Explain that memory has run out, with one message instead of torch's traceback."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from dsv2.config.schema import Config
from dsv2.errors import UserError
from dsv2.parallel.environment import launched_ranks


@contextmanager
def memory_explained(config: Config) -> Iterator[None]:
    """If memory runs out, say which settings need less memory.

    Raises:
        UserError: instead of torch's error, on a GPU or the CPU.
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
            f"expert_parallel_size={parallel.expert_parallel_size}, zero_stage={parallel.zero_stage}; take a "
            "smaller micro-batch, runtime.recompute=true, more ranks to share experts and "
            "optimizer states, or a smaller model; `python -m dsv2 plan gpus=N` with the same overrides "
            "counts what a layout needs"
        ) from error


def _shortage(error: Exception) -> str | None:
    """Return how much memory could not be allocated, as text to append; None for any other error."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, for GPUs
        sizes = re.search(r"allocate ([\d.]+ \w+).*capacity of ([\d.]+ \w+)", text, re.DOTALL)
        return f", which needed {sizes[1]} more on a GPU of {sizes[2]}" if sizes else " (GPU)"
    if re.search(r"not enough memory|can't allocate memory", text):
        size = re.search(r"allocate (\d+) bytes", text)
        return f", which needed {int(size[1]) / 2**30:.2f} GiB more on the CPU" if size else " (CPU)"
    return " (CPU)" if isinstance(error, MemoryError) else None
