"""Time optimizer steps of any model through the engine that trains it, and print where the time goes.

    python -m dsv2 benchmark --steps 10 model=lite_slice runtime=gpu runtime.micro_batch_size=8
    torchrun --nproc_per_node=8 -m dsv2 benchmark model=lite runtime=gpu parallel.expert_parallel_size=8
    python -m dsv2 benchmark --against transformers,deepspeed_autoep:6 model=lite_slice runtime=gpu

Tokens are random unless data.path=FOLDER names a prepared folder. data.sequence_length is 4096 unless given.
The command prints a row of figures and, for one further step, the share of each part of the model.

With --against, other frameworks do the same work. They and this project take turns, each turn in its own
process. NAME:6 gives a peer its own micro-batch size. dsv2/benchmark/peers says how each one is set up.
"""

import argparse

from dsv2.cli.base import Verb


class Benchmark(Verb):
    name = "benchmark"
    help = "time optimizer steps, by part of the model and against other frameworks"
    text = __doc__

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        overrides = "Overrides of the configuration, as train takes them."
        add("overrides", nargs="*", metavar="NAME=VALUE", help=overrides)
        add("--steps", type=int, default=10, metavar="N", help="Number of timed steps (default 10).")
        add("--warmup", type=int, default=4, metavar="N", help="Number of untimed steps first (default 4).")
        balanced = "Give every expert the same number of tokens, instead of what the router chooses."
        add("--balanced", action="store_true", help=balanced)
        add("--out", metavar="FILE", help="Also write the figures to this file, as JSON.")
        profile = (
            "Write a trace of one step to this file, for chrome://tracing, and print the longest kernels."
        )
        add("--profile", metavar="FILE", help=profile)
        against = "Peers to compare with, such as transformers,torchtitan:4."
        add("--against", metavar="PEERS", help=against)
        rounds = "Number of turns per contender with --against (default 3)."
        add("--rounds", type=int, default=3, metavar="N", help=rounds)
        add("--contender", default=None, help=argparse.SUPPRESS)  # one turn of `--against`

    def run(self, options: argparse.Namespace) -> int:
        from dsv2.benchmark.measure import benchmark

        return benchmark(options)
