"""Turn text into a prepared folder that train reads; the same as `python -m data.prepare`.

    python -m dsv2 prepare stdlib
    python -m dsv2 prepare files corpus/ notes.txt --out prepared/corpus --vocab-size 8192

Every source has its own options: see `python -m dsv2 prepare SOURCE --help`.
"""

from argparse import ArgumentParser, Namespace

from data.errors import GO_ON
from dsv2.cli.base import ExitCode, Verb, print_error


class Prepare(Verb):
    name = "prepare"
    help = "turn text into a folder of tokens to train on"
    text = __doc__
    interrupted = f"interrupted; {GO_ON}"

    def arguments(self, parser: ArgumentParser) -> None:
        from data.prepare.command import add_arguments

        add_arguments(parser)

    def parse(self, words: list[str]) -> Namespace:
        return self.parser().parse_args(words)

    def run(self, options: Namespace) -> int:
        from data.prepare.command import run

        try:
            run(options)
        except OSError as error:  # such as a full disk, or a file that may not be read
            print_error(f"{error}; correct the cause and {GO_ON}")
            return ExitCode.error
        return ExitCode.ok
