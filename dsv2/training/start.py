"""Where a run begins: at a checkpoint, with the weights of a Hugging Face folder, or afresh."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dsv2.config.compose import to_plain
from dsv2.config.schema import Config
from dsv2.errors import UserError

if TYPE_CHECKING:
    from dsv2.checkpoint.find import CheckpointFinder
    from dsv2.checkpoint.state import Found
    from dsv2.checkpoint.store import CheckpointStore
    from dsv2.hf.init_from import HFWeights


class Start(NamedTuple):
    """Where the run begins. `found` and `weights` are both None for a run that begins afresh."""

    store: "CheckpointStore"  # the run's own checkpoints
    found: "Found | None"  # the checkpoint to begin at
    weights: "HFWeights | None"  # of init_from, if there is no checkpoint


def check_files(config: Config) -> None:
    """Check data, and the folders to begin at, as far as that needs no torch: a mistake is told at once.

    Raises:
        UserError: names the field, its value and what would be right.
    """
    from data.streams.sources import source_of
    from dsv2.checkpoint.find import CheckpointFinder
    from dsv2.hf.fields import compare_config, read_config

    source_of(config.data).check(config.data, config.model.vocab_size, config.eval.sequences)
    found = _find_checkpoint(config, CheckpointFinder(config.run_dir / "checkpoints", to_plain(config)))
    if found is None and config.init_from is not None:
        folder = Path(config.init_from)
        compare_config(read_config(folder), config.model, folder)
        _check_tokenizer_of(folder, config)


def _find_checkpoint(config: Config, finder: "CheckpointFinder") -> "Found | None":
    """Return the checkpoint to begin at, which fits the configuration and the data; None: there is none."""
    from data.streams.sources import check_resumed, check_tokenizer
    from dsv2.training.schedule import check_profiled_steps

    found = finder.find(config.resume, config.stop_step)
    check_profiled_steps(config, found.state.step if found else 0, found.state.tokens if found else 0)
    if found:
        if found.state.data:
            check_resumed(config.data, found.state.data, found.content["config"]["data"])
        check_tokenizer(config.data, found.content["run"].get("tokenizer"), f"checkpoint {found.path}")
    return found


def _check_tokenizer_of(folder: Path, config: Config) -> None:
    """Refuse a Hugging Face folder whose tokenizer has other pieces than the data's, or that has none."""
    from data.streams.sources import check_tokenizer
    from data.tokenizers.load import load_tokenizer

    files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    if not files:
        raise UserError(
            f"init_from={folder}: has no tokenizer.json to compare with the tokenizer of the data; copy "
            "the one that the weights were trained with there"
        )
    check_tokenizer(config.data, load_tokenizer(files[0]).record(), f"init_from={folder}")


def find_device(config: Config, processes: int) -> str:
    """Return this process's device, "cpu" or "cuda:N", for a job with `processes` processes on this machine.

    Raises:
        UserError: this machine cannot run the job; see `pick_device`.
    """
    from dsv2.model.attention.kinds import attention_kind
    from dsv2.parallel.device import pick_device

    return pick_device(config, processes, attention_kind(config.model).latent_heads(config.model))


def find_start(config: Config) -> Start:
    """Find where the run begins; call `check_files` first.

    Raises:
        UserError: the checkpoint or the weights do not fit the configuration or the data; or the run ends
            before the steps that it shall profile.
    """
    from dsv2.checkpoint.store import CheckpointStore
    from dsv2.hf.init_from import HFWeights

    store = CheckpointStore(
        config.run_dir / "checkpoints",
        config.checkpoint.keep,
        to_plain(config),
        keep_every=config.checkpoint.keep_every,
    )
    found = _find_checkpoint(config, store)
    if found is not None or config.init_from is None:
        return Start(store, found, None)
    return Start(store, None, HFWeights(Path(config.init_from), config.model))
