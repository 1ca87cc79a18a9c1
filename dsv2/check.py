"""Would this job start? `python -m dsv2.check PROCESSES [overrides...]` answers before torchrun does.

torchrun buries a mistake under a report of its own and always exits with 1; the launchers ask here
first, so that a mistake is one line and exit code 2.
"""

import sys

from dsv2.compose import compose_config
from dsv2.config import DataSource
from dsv2.errors import UserError
from dsv2.validate import validate


def main(processes: str, *overrides: str) -> int:
    """0, or 2 with one message: what train.py itself would refuse in the configuration or the data."""
    try:
        config = compose_config(list(overrides))
        validate(config, int(processes))
        if config.data.source is not DataSource.stdlib:  # that one is prepared by the job itself
            from data.stream import check_data

            check_data(config.data, config.model.vocab_size, config.eval.sequences)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
