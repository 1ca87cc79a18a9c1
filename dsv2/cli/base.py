"""What every verb of `python -m dsv2` shares: its interface, the error line and the exit codes.

A verb is a file of this folder and one line in dsv2/__main__.py. It parses its words, calls one function and
returns. That function and its modules are imported only when the verb runs, so that `--help` answers at once.
"""

import argparse
import difflib
import enum
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from data.errors import Parser
from dsv2.errors import CheckpointError, Diverged, PeerLost, Unreadable, UserError


class ExitCode(enum.IntEnum):
    """The exit codes of every verb and of train.py, each with its meaning."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> "ExitCode":
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    ok = 0, "done; or training stopped by SIGTERM, SIGINT or stop_step after saving"
    error = 1, "something failed that is not your mistake, such as a full disk"
    mistake = 2, "a mistake in the configuration, the data, a file or the command line"
    diverged = 3, "the loss, the gradient or a weight is no longer a number"
    interrupted = 130, "interrupted before there was anything to save"


EXIT_CODES: dict[type[BaseException], ExitCode] = {
    UserError: ExitCode.mistake,
    CheckpointError: ExitCode.error,
    Diverged: ExitCode.diverged,
    Unreadable: ExitCode.error,
    PeerLost: ExitCode.error,  # the process that failed has printed the reason
    KeyboardInterrupt: ExitCode.interrupted,
}
EXPECTED = tuple(EXIT_CODES)  # errors that end a verb with one line instead of a traceback


def exit_code(error: BaseException) -> ExitCode:
    """Return the exit code for an error; 1 if it is none of `EXPECTED`."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), ExitCode.error)


def print_error(error: object) -> None:
    """Print an error in the form that all verbs share."""
    print(f"error: {error}", file=sys.stderr, flush=True)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument of the verbs that read a checkpoint."""
    text = "A step-N folder; or a run's folder, for its newest whole checkpoint."
    parser.add_argument("checkpoint", type=Path, help=text)


class Verb(ABC):
    """One command: what `python -m dsv2 NAME` does."""

    name: str
    help: str  # one line, for the list of verbs
    text: str | None  # what `--help` says before the options: the module's docstring
    interrupted = "interrupted"  # what is printed after `error: ` on Ctrl-C

    @abstractmethod
    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments that the verb takes, each with a sentence of help."""

    @abstractmethod
    def run(self, options: argparse.Namespace) -> int:
        """Do the work; return the exit code. An error of `EXPECTED` becomes one line."""

    def parser(self) -> argparse.ArgumentParser:
        """Return the parser, complete with help."""
        parser = Parser(
            prog=f"python -m dsv2 {self.name}",
            description=self.text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.arguments(parser)
        return parser

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Parse the words after the verb's name; options may stand between overrides."""
        return self.parser().parse_intermixed_args(words)


def usage(verbs: Sequence[Verb]) -> str:
    """Return the list of verbs, one line each."""
    width = max((len(verb.name) for verb in verbs), default=9)
    lines = [f"  {verb.name:{width}}  {verb.help}" for verb in verbs]
    codes = [f"  {code:<{width}}  {code.meaning}" for code in ExitCode]
    return "\n".join(
        [
            "usage: python -m dsv2 VERB [arguments]     (python -m dsv2 VERB --help explains them)",
            "",
            *lines,
            "",
            "Exit codes:",
            *codes,
            "",
            "Commands of earlier versions and what replaces them: docs/commands.md",
        ]
    )


def find(name: str, verbs: Sequence[Verb]) -> Verb:
    """Return the verb of that name.

    Raises:
        UserError: no verb has this name; the message suggests the nearest name.
    """
    names = [verb.name for verb in verbs]
    if name in names:
        return verbs[names.index(name)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"
    raise UserError(f"{name}: there is no such verb; {hint}")


def main(words: list[str], verbs: Sequence[Verb]) -> int:
    """Run the verb that `words` begins with; return its exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(usage(verbs))
        return ExitCode.ok if words else ExitCode.mistake
    interrupted = Verb.interrupted
    try:
        verb = find(words[0], verbs)
        interrupted = verb.interrupted
        code = verb.run(verb.parse(words[1:]))
        sys.stdout.flush()  # so that a full disk is reported here and not ignored at the end
        return code
    except KeyboardInterrupt:
        print_error(interrupted)
        return ExitCode.interrupted
    except EXPECTED as error:
        print_error(error)
        return exit_code(error)
    except OSError as error:  # such as a full disk, or a file that may not be read or written
        print_error(error)
        return ExitCode.error
