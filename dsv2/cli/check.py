"""What is looked at before any process group is made; and, as a command, by itself:

    python -m dsv2 check PROCESSES [overrides...]

torchrun buries a mistake under a report of its own and always exits with 1, so launch/local.sh asks
here first: then a mistake is one line and exit code 2.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsv2.config.compose import compose_config, to_plain
from dsv2.config.schema import Config
from dsv2.errors import UserError
from dsv2.training.rundir import claim, let_go
from dsv2.training.validate import validate

if TYPE_CHECKING:
    from dsv2.checkpoint.state import Found
    from dsv2.checkpoint.store import CheckpointStore
    from dsv2.hf.init_from import HFWeights


def find_start(config: Config) -> tuple["CheckpointStore", "Found | None", "HFWeights | None"]:
    """The run's checkpoints, and where it starts: at one of them, else at init_from's weights, else afresh.

    Raises:
        UserError: the data, the checkpoint or the weights are not what the configuration needs.
    """
    from data.streams.sources import check_resumed, source_of
    from dsv2.checkpoint.store import CheckpointStore
    from dsv2.hf.init_from import HFWeights

    source_of(config.data).check(config.data, config.model.vocab_size, config.eval.sequences)
    store = CheckpointStore(config.run_dir / "checkpoints", config.checkpoint.keep, to_plain(config))
    found = store.find(config.resume, config.stop_step)
    if found and found.state.data:
        check_resumed(config.data, found.state.data)
    if found is not None or config.init_from is None:
        return store, found, None
    return store, None, HFWeights(Path(config.init_from), config.model)


def _look(config: Config, processes: int) -> None:
    from dsv2.parallel.device import pick_device

    pick_device(config, processes)
    find_start(config)
    let_go(claim(config.run_dir), config.run_dir)


def main(argv: list[str]) -> int:
    """0, or 2 with one message: what train.py would refuse on a machine with that many processes."""
    processes, *overrides = argv
    try:
        config = compose_config(overrides)
        validate(config, int(processes))
        _look(config, int(processes))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
