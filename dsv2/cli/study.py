"""Run a study: train its arms, each with several seeds, and write a table that compares them.

    python -m dsv2 study balance
    python -m dsv2 study granularity --seeds 5 --at-once 3 optim.total_tokens=20_000_000

An arm is a set of overrides to experiment=study/NAME. Overrides on the command line apply to every arm. Runs,
logs and tables (table.md, table.json) are written to the --out folder. The same command continues an
interrupted study: finished runs are kept. Their checkpoints are removed, because only their metrics are used.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from data.errors import GO_ON
from dsv2.cli.base import Verb
from dsv2.errors import UserError


class Study(Verb):
    name = "study"
    help = "train several variants of a model and compare them in a table"
    text = __doc__
    interrupted = f"interrupted; {GO_ON}"

    def arguments(self, parser: ArgumentParser) -> None:
        from dsv2.studies.arms import STUDIES

        add = parser.add_argument
        add("study", help=f"The study to run: {', '.join(STUDIES)}.")
        overrides = "Overrides of the configuration, as train takes them; they apply to every arm."
        add("overrides", nargs="*", default=[], metavar="NAME=VALUE", help=overrides)
        add("--seeds", type=int, default=3, metavar="N", help="Number of runs per arm (default 3).")
        at_once = "Number of runs at the same time (default 1). One small model leaves a GPU half idle."
        add("--at-once", type=int, default=1, metavar="N", help=at_once)
        add("--out", type=Path, metavar="DIR", help="The folder to write to (default runs/study-NAME).")

    def run(self, options: Namespace) -> int:
        from dsv2.studies.run import run_study

        if options.at_once < 1:
            raise UserError(f"--at-once {options.at_once}: must be at least 1")
        return run_study(
            options.study,
            seeds=options.seeds,
            at_once=options.at_once,
            out=options.out or Path(f"runs/study-{options.study}"),
            overrides=options.overrides,
        )
