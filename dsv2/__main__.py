"""The entry of `python -m dsv2 VERB`, and the list of verbs. Each verb is a file of dsv2/cli."""

import sys

from data.output import make_printing_safe
from dsv2.cli.base import Verb, main
from dsv2.cli.benchmark import Benchmark
from dsv2.cli.cache import Cache
from dsv2.cli.check import Check
from dsv2.cli.dashboard import Dashboard
from dsv2.cli.export import Export
from dsv2.cli.generate import Generate
from dsv2.cli.plan import Plan
from dsv2.cli.prepare import Prepare
from dsv2.cli.report import Report
from dsv2.cli.study import Study
from dsv2.cli.train import Train

VERBS: tuple[Verb, ...] = (
    Train(),
    Check(),
    Prepare(),
    Generate(),
    Export(),
    Plan(),
    Cache(),
    Report(),
    Dashboard(),
    Benchmark(),
    Study(),
)

if __name__ == "__main__":
    make_printing_safe(BrokenPipeError)
    sys.exit(main(sys.argv[1:], VERBS))
