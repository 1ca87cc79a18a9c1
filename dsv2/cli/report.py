"""Write one self-contained HTML page of a run: curves, routing maps over time, final values, configuration.

    python -m dsv2 report runs/quickstart
    python -m dsv2 report runs/quickstart --out quickstart.html
    python -m dsv2 report runs/quickstart runs/second

The page of several runs lays their curves over each other. Its tables show the options that differ and the
throughput of each layout. A run may be finished or still running. Neither writing the page nor reading it
needs a network.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dsv2.cli.base import ExitCode, Verb


class Report(Verb):
    name = "report"
    help = "write one HTML page of a run, or of several runs"
    text = __doc__

    def arguments(self, parser: ArgumentParser) -> None:
        text = "A run's folder, such as runs/quickstart; several folders are compared on one page."
        parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help=text)
        out = "The file to write (default RUN_DIR/report.html; report.html here for several runs)."
        parser.add_argument("--out", type=Path, metavar="FILE", help=out)

    def run(self, options: Namespace) -> int:
        from dsv2.monitoring.report.comparison import write_comparison
        from dsv2.monitoring.report.page import write_page

        first, *others = options.run_dirs
        if others:
            print(write_comparison(options.run_dirs, options.out or Path("report.html")))
        else:
            print(write_page(first, options.out or first / "report.html"))
        return ExitCode.ok
