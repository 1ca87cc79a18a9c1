"""Write one self-contained HTML page of a run: curves, routing maps over time, final values, configuration.

    python -m dsv2 report runs/quickstart
    python -m dsv2 report runs/quickstart --out quickstart.html

The run may be finished or still running. Neither writing the page nor reading it needs a network.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dsv2.cli.base import ExitCode, Verb


class Report(Verb):
    name = "report"
    help = "write one HTML page of a run"
    text = __doc__

    def arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("run_dir", type=Path, help="The run's folder, such as runs/quickstart.")
        out = "The file to write (default RUN_DIR/report.html)."
        parser.add_argument("--out", type=Path, metavar="FILE", help=out)

    def run(self, options: Namespace) -> int:
        from dsv2.monitoring.report.page import write_page

        print(write_page(options.run_dir, options.out or options.run_dir / "report.html"))
        return ExitCode.ok
