"""A run that needs more memory than is free is refused before it takes any, with a layout that fits."""

import re

import pytest

from dsv2.errors import UserError
from dsv2.model.sizes import count_parameters
from dsv2.planner import fit
from dsv2.planner.fit import GIB, Room, check_memory
from dsv2.planner.memory import memory
from dsv2.planner.search import USABLE
from dsv2.training.validate import validate
from tests.unit.helpers import compose_config, run_verb

SMALL = ["model=small", "runtime.micro_batch_size=8"]
ON_GPU = ["model=lite", "runtime=gpu", "data.sequence_length=4096", "runtime.micro_batch_size=4"]
ON_GPU += ["optim.batch_size=64", "optim.total_tokens=1_000_000_000"]


def refusal(overrides: list[str], processes: int, room: Room) -> str:
    config = compose_config(*overrides)
    validate(config, processes)
    with pytest.raises(UserError) as caught:
        check_memory(config, processes, room)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "room"),
    [
        (SMALL, Room(2, 8 * GIB, on_gpu=False)),
        ([*SMALL, "parallel.expert_parallel_size=2"], Room(2, 7 * GIB, on_gpu=False)),
        (ON_GPU, Room(8, 79 * GIB, on_gpu=True)),
    ],
)
def test_both_numbers_and_a_layout_that_fits(overrides, room):
    message = refusal(overrides, room.processes, room)
    found = re.fullmatch(
        r"runtime\.check_memory=true: .* about ([\d.]+) GiB of .* memory, of which ([\d.]+) GiB are free\. "
        r"This fits: ([^()]+) \(([\d.]+) GiB\)\. runtime\.check_memory=false starts the run anyway",
        message,
    )
    assert found, message
    needed, free, words, proposed = found.groups()
    assert float(free) == room.free / GIB
    assert float(needed) > float(free)
    config = compose_config(*overrides, *words.split())
    validate(config, room.processes)
    check_memory(config, room.processes, room)
    assert float(proposed) == pytest.approx(room.needed(config, room.processes) / GIB, abs=0.05)
    assert float(proposed) <= USABLE * float(free)


def test_all_processes_of_the_machine_count():
    config = compose_config("experiment=quickstart")
    one = Room(1, 0, on_gpu=False).needed(config, 2)
    assert Room(2, 0, on_gpu=False).needed(config, 2) == 2 * one
    assert 0.1 * GIB < one - fit.PROCESS < 0.5 * GIB, "a bucket that no gradient touches takes no memory"
    waiting = compose_config("experiment=quickstart", "checkpoint.asynchronous=false")
    states = memory(config, 2, gpu=False).states
    copy = one - Room(1, 0, on_gpu=False).needed(waiting, 2)
    assert copy == pytest.approx(states.masters + states.moments), "fp32 weights and Adam's moments"


def test_copies_for_saves_of_a_gpu_run_count_for_the_host():
    config = compose_config(*ON_GPU, "parallel.expert_parallel_size=8", "runtime.recompute=true")
    validate(config, 8)
    copies = 8 * memory(config, 8).saved
    assert copies == pytest.approx(12 * count_parameters(config.model).total, rel=1e-3)
    room = Room(8, 141 * GIB, on_gpu=True, free_host=copies)
    check_memory(config, 8, room)
    room = room._replace(free_host=100 * GIB)
    with pytest.raises(UserError) as caught:
        check_memory(config, 8, room)
    assert str(caught.value) == (
        f"checkpoint.asynchronous=true: the copies for saves need about {copies / GIB:.1f} GiB of this "
        "machine's memory, of which 100.0 GiB are free. checkpoint.asynchronous=false needs no copies. "
        "runtime.check_memory=false starts the run anyway"
    )
    for remedy in ("checkpoint.asynchronous=false", "runtime.check_memory=false"):
        words = [*ON_GPU, "parallel.expert_parallel_size=8", "runtime.recompute=true", remedy]
        check_memory(compose_config(*words), 8, room)


def test_if_nothing_fits_here_it_says_what_it_takes():
    message = refusal(["model=lite"], 2, Room(2, 20 * GIB, on_gpu=False))
    assert "2 processes need about 640.1 GiB of this machine's memory" in message
    assert "No layout of 2 processes fits here; on 8 x H100 this does: " in message


def test_a_model_for_no_machine():
    layers = ["model=v2", "model.num_hidden_layers=6000", "optim.batch_size=4"]
    assert "nor any of up to " in refusal(layers, 1, Room(1, 20 * GIB, on_gpu=False))


def test_enough_memory_or_the_users_will():
    config = compose_config(*SMALL)
    check_memory(config, 2, Room(2, Room(2, 0, on_gpu=False).needed(config, 2), on_gpu=False))
    check_memory(compose_config(*SMALL, "runtime.check_memory=false"), 2, Room(2, 0, on_gpu=False))


def test_the_check_before_a_job_asks(monkeypatch, capsys, tmp_path, jsonl):
    monkeypatch.setattr(fit, "free_host_memory", lambda: 1 * GIB)
    assert (
        run_verb("prepare", "jsonl", jsonl, "--out", tmp_path / "data", "--vocab-size", 320, "--quiet") == 0
    )
    capsys.readouterr()
    words = [
        "data=local",
        f"data.path={tmp_path / 'data'}",
        f"runs_dir={tmp_path / 'runs'}",
        "eval.sequences=1",
    ]
    words += ["model=lite", "data.sequence_length=64", "optim.warmup_steps=0"]
    assert run_verb("check", "2", *words) == 2
    assert "of which 1.0 GiB are free. No layout of 2 processes" in capsys.readouterr().err
    assert run_verb("check", "2", *words, "runtime.check_memory=false") == 0
    assert not (tmp_path / "runs" / "run").exists()
