"""`python -m dsv2 check`: it checks what `python -m dsv2 train` would start, and prints that it may start."""

import pytest

import train
from dsv2.cli import check
from dsv2.cli.adjust import adjust
from dsv2.config.compose import compose_config
from dsv2.errors import UserError
from dsv2.parallel import device
from dsv2.training import start
from tests.unit.helpers import run_verb

QUICKSTART = "experiment=quickstart"


@pytest.mark.parametrize(
    ("processes", "appended", "last"),
    [
        ("1", ["parallel.expert_parallel_size=1"], "ok: 1 process, 489 steps"),
        ("2", [], "ok: 2 processes, 489 steps"),
        ("4", ["runtime.micro_batch_size=2"], "ok: 4 processes, 489 steps"),
    ],
)
def test_it_checks_what_train_would_start(processes, appended, last, monkeypatch, capsys):
    checked = []

    def record(*words):
        checked.append(words)
        return compose_config(words[1])

    monkeypatch.setattr(check, "check", record)
    assert run_verb("check", processes, QUICKSTART) == 0
    assert checked == [(int(processes), [QUICKSTART, *appended])]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*adjust([QUICKSTART], int(processes)).notes, last]
    assert len(lines) == 1 + len(appended)


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (["runtime=gpu"], "runtime.device=cuda: there is no GPU on this machine"),
        (["runtime.kernels=fused", "runtime.precision=bf16"], "runtime.kernels=fused: needs an NVIDIA GPU"),
        (["model=v2"], "runtime.check_memory=true: the process needs about "),
    ],
)
@pytest.mark.parametrize("entry", ["check", "train"])
def test_the_machine_is_checked_before_any_data_are_prepared(monkeypatch, entry, overrides, refusal):
    monkeypatch.setattr(device, "visible_gpus", lambda config: 0)
    for module in (start, train):
        monkeypatch.setattr(module, "check_files", lambda config: pytest.fail("may prepare data"))
    enter = {
        "check": lambda: check.check(1, overrides),
        "train": lambda: train.train(compose_config(overrides)),
    }[entry]
    with pytest.raises(UserError, match=f"^{refusal}"):
        enter()


def test_a_mistake_prints_no_ok(capsys):
    assert run_verb("check", "3", QUICKSTART) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(
        "error: parallel.expert_parallel_size=2: must divide the number of processes, 3"
    )
