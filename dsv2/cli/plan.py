"""Print whether a run fits into memory and how long it takes. The plan needs no GPU and no data.

    python -m dsv2 plan experiment=v2 gpus=128 gpu=h100 ep=8 zero=1
    python -m dsv2 plan experiment=lite gpus=8 gpu=h100 --search

docs/planning.md says what is counted, what is assumed, and how to check a plan against a run.
"""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from dsv2.cli.base import ExitCode, Verb
from dsv2.errors import UserError

if TYPE_CHECKING:  # these import Hydra
    from dsv2.config.schema import Config
    from dsv2.planner.search import Machines

WORDS = ("gpus", "gpu", "gpus_per_node", "mfu")  # of the planner; all others belong to the configuration


def _number(word: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    limit = 1 if word == "mfu" else float("inf")
    if not 0 < value <= limit:
        right = "a share of the peak, such as 0.3" if word == "mfu" else "a number of at least 1"
        raise UserError(f"{word}={text}: must be {right}")
    return value


def read(arguments: list[str]) -> tuple["Machines", list[str]]:
    """Return the machines and the overrides of the configuration.

    Raises:
        UserError: a word or field does not exist, or a value is impossible.
    """
    from dsv2.config.fields import field_types
    from dsv2.config.mistakes import SHORT, unknown_key
    from dsv2.parallel.gpus import find_gpu
    from dsv2.planner.search import Machines

    words: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument}: must be written as NAME=VALUE")
        name = key.lstrip("+~")
        if key in WORDS:
            words[key] = value
        elif key in SHORT:
            overrides.append(f"{SHORT[key]}={value}")
        elif name in field_types() or name == "experiment":
            overrides.append(argument)
        else:
            raise UserError(unknown_key(name, argument, (*WORDS, *SHORT)))
    if "gpus" not in words:
        raise UserError("gpus: must be given, as gpus=NUMBER of all GPUs")
    gpus = int(_number("gpus", words["gpus"], int))
    per_node = int(_number("gpus_per_node", words.get("gpus_per_node", "8"), int))
    if gpus > per_node and gpus % per_node:
        raise UserError(f"gpus={gpus}: must be at most gpus_per_node={per_node}, or a multiple of it")
    mfu = float(_number("mfu", words["mfu"], float)) if "mfu" in words else None
    return Machines(gpus, find_gpu(words.get("gpu", "h100")), per_node, mfu), overrides


def load(overrides: list[str], machines: "Machines", any_layout: bool = False) -> "Config":
    """Return the configuration as train.py would read it; data.path may be missing.

    With `any_layout` the layout is replaced: each rank holds all experts and runs one sequence at a time.
    """
    from dsv2.config.compose import compose_overrides, to_config
    from dsv2.kernels.specs import find_spec
    from dsv2.model.attention.kinds import attention_kind
    from dsv2.training.validate import validate

    composed = compose_overrides(overrides)
    composed.data.source = "local"
    composed.data.path = "not read"
    config = to_config(composed)
    if any_layout:
        config.parallel.expert_parallel_size = 1
        config.runtime.micro_batch_size = 1
    validate(config, machines.gpus)
    kernels = find_spec(config.runtime.kernels)
    heads = attention_kind(config.model).latent_heads(config.model)
    kernels.check_gpu(machines.gpu.name, machines.gpu.capability, heads)
    return config


class Plan(Verb):
    name = "plan"
    help = "print whether a run fits into memory and how long it takes"
    text = __doc__

    def arguments(self, parser: ArgumentParser) -> None:
        from dsv2.config.mistakes import SHORT
        from dsv2.parallel.gpus import GPUS

        parser.add_argument(
            "words", nargs="*", metavar="NAME=VALUE", help="Words of the planner and overrides, see below."
        )
        search = "List the layouts that fit, fastest first."
        parser.add_argument("--search", action="store_true", help=search)
        parser.epilog = f"""words of the planner:
  gpus=N             Number of all GPUs of the job; must be given.
  gpu=NAME           Kind of GPU: {", ".join(GPUS)} (default h100).
  gpus_per_node=N    Number of GPUs per machine (default 8).
  mfu=SHARE          Model FLOPs utilisation of the whole step, if known (default: estimated).
  ep, zero, micro_batch   Short for {", ".join(SHORT.values())}.
All other words are overrides of the configuration, as train takes them."""

    def run(self, options: Namespace) -> int:
        from dsv2.planner.search import plan, search
        from dsv2.planner.text import plan_lines, search_lines

        machines, overrides = read(options.words)
        config = load(overrides, machines, any_layout=options.search)
        if options.search:
            lines = search_lines(config, machines, search(config, machines))
        else:
            lines = plan_lines(plan(config, machines))
        print("\n".join(lines))
        return ExitCode.ok
