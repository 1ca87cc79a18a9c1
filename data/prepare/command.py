"""The command that prepares text for training:

    python -m data.prepare stdlib
    python -m data.prepare files corpus/ notes.txt --out prepared/corpus --vocab-size 8192
    python -m data.prepare jsonl 'dump/*.jsonl' --text-key body --tokenizer tokenizer.json --out prepared/dump

The arguments of each kind of corpus are the fields of its class (data/corpora).
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from data.corpora.base import Corpus
from data.corpora.kinds import CORPORA
from data.errors import GO_ON, Parser, Unreadable, UserError
from data.prepare.corpus import prepare
from data.prepare.settings import Settings
from data.prepared.manifest import MANIFEST, Manifest
from data.prepared.verify import verify
from data.reading import is_file

KINDS = {corpus.kind: corpus for corpus in CORPORA}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: the fields of the corpus and of `Settings`, `kind`, `out` and `quiet`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="SOURCE")
    for kind, corpus in KINDS.items():
        command = kinds.add_parser(kind, help=corpus.summary, description=corpus.summary)
        _add_fields(command, corpus)
        _add_fields(command, Settings)
        default = f" Default: {corpus.out}." if corpus.out else ""
        command.add_argument(
            "--out", default=corpus.out, required=corpus.out is None, help=f"The folder to write.{default}"
        )
        command.add_argument("--quiet", action="store_true", help="Print nothing except errors.")


def _add_fields(parser: argparse.ArgumentParser, fields_of: type[Corpus] | type[Settings]) -> None:
    """Add an argument per field: an option if the field has a default, else a positional argument."""
    hints = get_type_hints(fields_of)
    for field in dataclasses.fields(fields_of):
        hint = hints[field.name]
        options: dict[str, Any] = {"help": field.metadata["help"]}
        if get_origin(hint) is Literal:
            options["choices"] = get_args(hint)
        elif get_origin(hint) is tuple:
            options["nargs"] = "+"
        else:
            options["type"] = next(t for t in get_args(hint) or (hint,) if t is not NoneType)
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, **options)
            continue
        if field.default is not None:
            options["help"] += f" Default: {field.default}."
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)


def _fields(fields_of: type[Corpus] | type[Settings], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that are fields of a dataclass; lists as tuples."""
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(fields_of)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def run(arguments: argparse.Namespace) -> None:
    """Prepare what the arguments ask for, and print a summary.

    Raises:
        UserError: an argument or the text is wrong.
        OSError: a file cannot be read or written.
    """
    kind = KINDS[arguments.kind]
    if arguments.vocab_size is None and arguments.tokenizer is None:
        arguments.vocab_size = kind.vocab_size
    finished_before = is_file(Path(arguments.out) / MANIFEST)
    corpus = kind(**_fields(kind, arguments))
    settings = Settings(**_fields(Settings, arguments))
    manifest = prepare(corpus, arguments.out, settings, arguments.quiet)
    if finished_before:
        verify(Path(arguments.out))
    if not arguments.quiet:
        if finished_before:
            print(
                f"{arguments.out} already exists; to read the text again, remove that folder. Its files hold "
                "what was written"
            )
        print(summary(arguments.out, manifest))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    parser = Parser(
        prog="python -m data.prepare",
        description="Turn text into a prepared folder, which data=local trains on. "
        "`python -m data.prepare SOURCE --help` explains a source's options.",
    )
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Unreadable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # such as a full disk, or a file that may not be read
        print(f"error: {error}; correct the cause and {GO_ON}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"error: interrupted; {GO_ON}", file=sys.stderr)
        return 130
    return 0


def summary(out: str | Path, manifest: Manifest) -> str:
    """Return what was prepared, one line per split."""
    lines = [f"{out}: {manifest.source}, {manifest.vocab_size} pieces"]
    if manifest.skipped:
        names = ", ".join(manifest.skipped_examples[:5]) + (", ..." if manifest.skipped > 5 else "")
        lines.append(f"skipped: {manifest.skipped} documents that are not text ({names})")
    for name in ("train", "validation"):
        split = manifest.split(name)
        if split.unigram_nats is not None:
            per_token = split.text_bytes / split.tokens
            bits_per_byte = split.unigram_nats / math.log(2) / per_token
            lines.append(
                f"{name}: {split.documents} documents, {split.tokens} tokens, "
                f"{per_token:.2f} bytes per token; by frequencies alone "
                f"{split.unigram_nats:.3f} nats per token, {bits_per_byte:.3f} bits per byte"
            )
    return "\n".join(lines)
