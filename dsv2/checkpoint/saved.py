"""What a checkpoint says about its run: the configuration and the tokenizer. Imports no torch."""

from pathlib import Path

from data.streams.sources import source_of
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from dsv2.checkpoint.files import check
from dsv2.config.compose import from_plain
from dsv2.config.schema import Config
from dsv2.errors import UserError


def saved_config(path: Path) -> Config:
    """Return the configuration of the run that wrote the checkpoint. Its tensors are not read.

    Raises:
        UserError: `path` is no whole checkpoint, or its configuration does not fit this version.
    """
    return from_plain(check(path)["config"])


def saved_tokenizer(path: Path, config: Config, file: str | None) -> Tokenizer:
    """Return the tokenizer in `file`; without a file, the one that the run's data was made with.

    Args:
        path: the checkpoint.
        config: its `saved_config`.

    Raises:
        UserError: the tokenizer is missing, has more pieces than the model, or is not the one that the run
            was trained with.
    """
    right = "--tokenizer FILE must name the one that the run was trained with"
    try:
        tokenizer = load_tokenizer(file) if file else source_of(config.data).tokenizer(config.data)
    except UserError as error:
        raise UserError(f"{error}; --tokenizer FILE names the one that the run was trained with") from error
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.path}: has {tokenizer.vocab_size} pieces, and the model's vocab_size is "
            f"{config.model.vocab_size}; {right}"
        )
    saved = check(path)["run"].get("tokenizer")  # None in checkpoints of earlier versions
    if saved and saved["pieces_sha256"] != tokenizer.pieces_sha256:
        raise UserError(
            f"tokenizer {tokenizer.path}: has other pieces than {saved['file']}, with which {path} was "
            f"trained; {right}"
        )
    return tokenizer
