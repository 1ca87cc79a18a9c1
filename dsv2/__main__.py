"""`python -m dsv2 VERB`: every command but training."""

import importlib
import sys

VERBS = {
    "check": "dsv2.cli.check:main",
    "generate": "dsv2.inference.answers:main",
    "export": "dsv2.hf.export:main",
    "plan": "dsv2.cli.plan:run",
    "cache": "dsv2.planner.cache_table:main",
    "report": "dsv2.monitoring.report.run:main",
    "dashboard": "dsv2.monitoring.dashboard:main",
    "benchmark": "dsv2.benchmark.measure:main",
    "study": "dsv2.studies.run:main",
}


def main(arguments: list[str]) -> int:
    """Run the verb that `arguments` begins with; return its exit code."""
    if not arguments or arguments[0] not in VERBS:
        print(f"usage: python -m dsv2 VERB ...; VERB is one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module, _, function = VERBS[arguments[0]].partition(":")
    return getattr(importlib.import_module(module), function)(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
