"""Which layouts the planner lists, and the change it names."""

from dataclasses import replace

from dsv2.config.schema import Config, Precision
from dsv2.parallel.gpus import GPUS
from dsv2.planner.memory import memory
from dsv2.planner.search import Machines, changes, plan, search, smallest_change
from dsv2.planner.text import search_lines
from dsv2.training.validate import validate
from tests.unit.helpers import compose_config

LITE = compose_config("experiment=lite", "data.path=none")
CROWDED = replace(LITE, runtime=replace(LITE.runtime, micro_batch_size=4))
EIGHT = Machines(8, GPUS["h100"])


def with_memory(config: Config, machines: Machines, share: float) -> Machines:
    """The machines, with GPUs whose usable memory is this share of what `config` needs."""
    needed = memory(config, machines.gpus).peak
    gpu = replace(machines.gpu, memory=share * needed / 0.9)
    return machines._replace(gpu=gpu)


def test_every_listed_layout_fits_and_trains():
    found = search(LITE, EIGHT)
    assert len(found) > 10
    for one in found:
        assert one.fits
        assert one.memory.peak <= 0.9 * 79 * 2**30
        validate(one.config, 8)
    steps = [one.speed.step_s for one in found]
    assert steps == sorted(steps)


def test_the_layouts_left_out_do_not_fit():
    assert not plan(CROWDED, EIGHT).fits
    assert CROWDED not in [one.config for one in search(LITE, EIGHT)]


def test_what_cannot_train_is_not_listed():
    found = search(LITE, with_memory(LITE, EIGHT, 100))
    layouts = {(p.expert_parallel_size, p.zero_stage) for p in (one.config.parallel for one in found)}
    assert layouts == {(ep, stage) for ep in (1, 2, 4, 8) for stage in (1, 2, 3)}, "ZeRO-0 not in bf16"
    micro_batches = {one.config.runtime.micro_batch_size for one in found}
    assert micro_batches == {2**n for n in range(7)}, "4608 / 8 = 576 = 64 x 9"
    assert len(found) == len(layouts) * len(micro_batches) * 2
    in_fp32 = replace(LITE, runtime=replace(LITE.runtime, precision=Precision.fp32, kernels="reference"))
    stages = {one.config.parallel.zero_stage for one in search(in_fp32, with_memory(LITE, EIGHT, 100))}
    assert stages == {0, 1, 2, 3}


def test_the_smallest_change_is_one_word_where_one_will_do():
    given = plan(CROWDED, EIGHT)
    assert not given.fits
    other = smallest_change(given)
    assert other is not None
    assert other.fits
    assert len(changes(given, other)) == 1
    one_word = [one for one in search(CROWDED, EIGHT) if len(changes(given, one)) == 1]
    assert other.speed.step_s == min(one.speed.step_s for one in one_word)


def test_a_layout_that_nearly_fits_stays_on_its_gpus():
    given = plan(LITE, with_memory(LITE, EIGHT, 0.95))
    other = smallest_change(given)
    assert other is not None
    assert other.machines.gpus == 8


def test_more_gpus_only_where_nothing_else_helps():
    given = plan(LITE, with_memory(LITE, EIGHT, 0.4))
    assert not search(LITE, given.machines)
    other = smallest_change(given)
    assert other is not None
    assert other.fits
    assert other.machines.gpus > 8
    fewer = given.machines._replace(gpus=other.machines.gpus // 2)
    assert not search(LITE, fewer), "half as many would not do"


def test_nothing_helps():
    too_small = with_memory(LITE, EIGHT, 0.001)
    assert smallest_change(plan(LITE, too_small)) is None
    assert search_lines(LITE, too_small, [])[0].endswith("; no layout of up to gpus=256 fits")
    few = replace(LITE, optim=replace(LITE.optim, batch_size=16))
    said = "; no layout of up to gpus=16 fits; optim.batch_size=16 allows no more GPUs"
    assert search_lines(few, too_small, [])[0].endswith(said)


def test_more_zero_and_more_experts_elsewhere_need_less():
    """ZeRO-2 under ZeRO-1, EP 8 under EP 1, recomputing under keeping, on many ranks."""
    machines = Machines(64, GPUS["h100"])

    def states(**changes: int) -> int:
        config = replace(LITE, parallel=replace(LITE.parallel, **changes))
        return plan(config, machines).memory.states.total

    assert states(zero_stage=3) < states(zero_stage=2) < states(zero_stage=1)
    assert states(zero_stage=1, expert_parallel_size=8) < states(zero_stage=1, expert_parallel_size=1)
