"""Create the project's dashboard in W&B: a saved view with the sections of dsv2/monitoring/panels.py.

    python -m dsv2 dashboard --project dsv2
    python -m dsv2 dashboard --spec dashboard.json

Each call creates a new view.
"""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from dsv2.cli.base import ExitCode, Verb
from dsv2.monitoring.wandb_settings import PROJECT, wandb_project


class Dashboard(Verb):
    name = "dashboard"
    help = "create the saved view of metrics in W&B"
    text = __doc__

    def arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--entity", help="The owner of the W&B project (default: the account's own).")
        project = f"The runs' logging.project (default: WANDB_PROJECT, or {PROJECT})."
        parser.add_argument("--project", help=project)
        spec = "Write the view to this file as JSON and send nothing; this needs no network and no account."
        parser.add_argument("--spec", type=Path, metavar="FILE", help=spec)

    def run(self, options: Namespace) -> int:
        from dsv2.monitoring.dashboard import create, write_spec

        project = wandb_project(options.project, os.environ)
        if options.spec is not None:
            write_spec(options.spec, project)
            print(options.spec)
        else:
            print(create(options.entity, project))
        return ExitCode.ok
