"""Where a run begins: at a checkpoint, with the weights of a Hugging Face folder, or afresh."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dsv2.config.compose import to_plain
from dsv2.config.schema import Config

if TYPE_CHECKING:  # these import torch
    import torch

    from dsv2.checkpoint.state import Found
    from dsv2.checkpoint.store import CheckpointStore
    from dsv2.hf.init_from import HFWeights


class Start(NamedTuple):
    """Where the run begins. `found` and `weights` are both None for a run that begins afresh."""

    store: "CheckpointStore"  # the run's own checkpoints
    found: "Found | None"  # the checkpoint to begin at
    weights: "HFWeights | None"  # of init_from, if there is no checkpoint


def find_device(config: Config, processes: int) -> "torch.device":
    """Return this process's device, for a job with `processes` processes on this machine.

    Raises:
        UserError: this machine cannot run the job; see `pick_device`.
    """
    from dsv2.model.attention.kinds import attention_kind
    from dsv2.parallel.device import pick_device

    return pick_device(config, processes, attention_kind(config.model).latent_heads(config.model))


def find_start(config: Config) -> Start:
    """Check the data and find where the run begins.

    Raises:
        UserError: the data, the checkpoint or the weights do not fit the configuration.
    """
    from data.streams.sources import check_resumed, source_of
    from dsv2.checkpoint.store import CheckpointStore
    from dsv2.hf.init_from import HFWeights

    source_of(config.data).check(config.data, config.model.vocab_size, config.eval.sequences)
    store = CheckpointStore(
        config.run_dir / "checkpoints",
        config.checkpoint.keep,
        to_plain(config),
        keep_every=config.checkpoint.keep_every,
    )
    found = store.find(config.resume, config.stop_step)
    if found and found.state.data:
        check_resumed(config.data, found.state.data)
    if found is not None or config.init_from is None:
        return Start(store, found, None)
    return Start(store, None, HFWeights(Path(config.init_from), config.model))
