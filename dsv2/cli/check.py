"""Check a configuration, its data, checkpoint and run folder without training.

    python -m dsv2 check PROCESSES [overrides...]

The command checks what `NPROC=PROCESSES python -m dsv2 train` checks before it starts processes. It appends
the same overrides. A mistake is printed as one line, with exit code 2. Otherwise the last line is `ok`, with
the number of processes and steps.
"""

from argparse import ArgumentParser, Namespace

from dsv2.cli.adjust import adjust
from dsv2.cli.base import ExitCode, Verb
from dsv2.config.schema import Config
from dsv2.errors import UserError

IMPORTING = "importing torch"  # which takes seconds


def check(processes: int, overrides: list[str]) -> Config:
    """Check everything that can be checked before processes start, and return the configuration.

    Raises:
        UserError: train.py would refuse to start that many processes on this machine.
    """
    from dsv2.config.compose import compose_config
    from dsv2.training.validate import validate

    config = compose_config(overrides)
    validate(config, processes)

    from dsv2.parallel.device import may_use_gpu
    from dsv2.planner.fit import check_machine
    from dsv2.training.rundir import claim, let_go
    from dsv2.training.start import check_files, find_start

    has_gpu = may_use_gpu(config)
    if has_gpu:
        print(IMPORTING, flush=True)
    check_machine(config, processes, processes)
    check_files(config)
    let_go(claim(config.run_dir), config.run_dir)
    if not has_gpu:  # then torch is imported only now
        print(IMPORTING, flush=True)
    find_start(config)
    return config


class Check(Verb):
    name = "check"
    help = "check a configuration, its data and its checkpoint without training"
    text = __doc__

    def arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("processes", metavar="PROCESSES", help="Number of processes of the job.")
        overrides = "Overrides of the configuration, as train takes them."
        parser.add_argument("overrides", nargs="*", default=[], metavar="NAME=VALUE", help=overrides)

    def parse(self, words: list[str]) -> Namespace:
        if not words or words[0] in ("-h", "--help"):
            return self.parser().parse_args(words)
        # An override such as --lr=1 is left to the configuration, whose message names the field.
        return Namespace(processes=words[0], overrides=words[1:])

    def run(self, options: Namespace) -> int:
        if not options.processes.isdecimal() or int(options.processes) < 1:
            raise UserError(f"PROCESSES={options.processes}: must be a whole number, at least 1")
        processes = int(options.processes)
        adjusted = adjust(options.overrides, processes)
        for note in adjusted.notes:
            print(note, flush=True)
        config = check(processes, adjusted.overrides)

        from dsv2.training.schedule import count_steps

        steps = count_steps(config.optim, config.data.sequence_length)
        print(f"ok: {processes} {'process' if processes == 1 else 'processes'}, {steps} steps")
        return ExitCode.ok
