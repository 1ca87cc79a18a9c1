"""Print the size of the KV cache per token for each kind of attention, as in the paper's tables 1 and 9.

    python -m dsv2 cache model=lite [model.FIELD=VALUE ...]

The sizes come from the configuration; no checkpoint is read.
"""

from argparse import ArgumentParser, Namespace

from dsv2.cli.base import ExitCode, Verb


class Cache(Verb):
    name = "cache"
    help = "print the size of the KV cache for each kind of attention"
    text = __doc__

    def arguments(self, parser: ArgumentParser) -> None:
        overrides = "Overrides of the configuration, as train takes them."
        parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help=overrides)

    def run(self, options: Namespace) -> int:
        from dsv2.config.compose import compose_config
        from dsv2.planner.cache_table import table
        from dsv2.training.validate import validate

        config = compose_config(options.overrides)
        validate(config, world_size=1)
        print(table(config.model))
        return ExitCode.ok
