"""The ZeRO stages that parallel.zero_stage may name, by the precisions that each runs in."""

from dsv2.config.rules import refuse
from dsv2.config.schema import Precision
from dsv2.parallel.zero.base import ZeroStage
from dsv2.parallel.zero.stage0 import Stage0
from dsv2.parallel.zero.stage1 import Stage1
from dsv2.parallel.zero.stage1_bf16 import Stage1BF16
from dsv2.parallel.zero.stage2 import Stage2
from dsv2.parallel.zero.stage3 import Stage3

STAGES: dict[tuple[int, Precision], type[ZeroStage]] = {
    (0, Precision.fp32): Stage0,
    (1, Precision.fp32): Stage1,
    (1, Precision.bf16): Stage1BF16,
    (2, Precision.fp32): Stage2,
    (2, Precision.bf16): Stage2,
    (3, Precision.fp32): Stage3,
    (3, Precision.bf16): Stage3,
}


def numbers(precision: Precision) -> list[int]:
    """Return the stages that run in this precision."""
    return [number for number, runs_in in STAGES if runs_in is precision]


def find_stage(number: int, precision: Precision) -> ZeroStage:
    """Return the stage of this number for runs in this precision.

    Raises:
        UserError: there is no such stage, or it does not run in this precision.
    """
    if number not in numbers(Precision.fp32):
        refuse("parallel.zero_stage", number, f"must be {_listed(numbers(Precision.fp32))}")
    if number not in numbers(precision):
        refuse(
            "parallel.zero_stage",
            number,
            f"must be {_listed(numbers(precision))} with runtime.precision=bf16, for fp32 master weights; "
            "or use runtime.precision=fp32",
        )
    return STAGES[number, precision]()


def _listed(values: list[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}"
