"""Console lines, letter by letter."""

from pathlib import Path

import pytest

from dsv2.formats import fmt_count, fmt_time
from dsv2.monitoring.console import end_lines, eval_line, start_lines, step_line

STEP = {
    "step": 120,
    "total_steps": 2000,
    "loss": 4.1234,
    "grad_norm": 0.981,
    "lr": 4.2e-4,
    "tok_s": 12_345.0,
    "mem_gib": 1.23,
    "eta_s": 754.4,
}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (9.54, "9.5"),
        (99.94, "99.9"),
        (99.96, "100"),
        (812.4, "812"),
        (999, "999"),
        (999.96, "1.0K"),
        (1000, "1.0K"),
        (12_345, "12.3K"),
        (999_949, "999.9K"),
        (999_950, "1.0M"),
        (3_200_000, "3.2M"),
        (15_706_484_224, "15.7B"),
        (8.1e12, "8.1T"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_fmt_count(number, text):
    assert fmt_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.4, "0:00:59"),
        (59.6, "0:01:00"),
        (754, "0:12:34"),
        (86_399, "23:59:59"),
        (86_399.7, "1d 00:00:00"),
        (2 * 86_400 + 3 * 3600 + 4 * 60 + 5, "2d 03:04:05"),
        (-3, "0:00:00"),
        (None, "?"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_fmt_time(seconds, text):
    assert fmt_time(seconds) == text


def test_step_line_on_a_gpu():
    assert step_line(**STEP, mfu=0.4123) == (
        "step  120/2000  loss 4.123  gnorm 0.98  lr 4.20e-04"
        "  12.3K tok/s  mfu 41.2%  mem 1.2 GiB  eta 0:12:34"
    )


def test_step_line_without_a_known_peak_has_no_mfu():
    line = "step  120/2000  loss 4.123  gnorm 0.98  lr 4.20e-04  12.3K tok/s  mem 1.2 GiB  eta 0:12:34"
    assert step_line(**STEP) == line


def test_step_lines_align_from_the_first_to_the_last_step():
    first = step_line(**{**STEP, "step": 1})
    last = step_line(**{**STEP, "step": 2000})
    assert first.startswith("step    1/2000  loss")
    assert last.startswith("step 2000/2000  loss")


def test_step_line_with_a_diverged_loss():
    line = step_line(**{**STEP, "loss": float("nan"), "eta_s": None})
    assert "  loss nan  " in line
    assert line.endswith("  eta ?")


def test_eval_line():
    assert eval_line(step=5, total_steps=20, loss=3.21987) == "eval  5/20  loss 3.220"
    with_bytes = eval_line(step=5, total_steps=20, loss=3.21987, bits_per_byte=1.4449)
    assert with_bytes == "eval  5/20  loss 3.220  bpb 1.445"


def test_start_lines():
    facts = {
        "name": "quickstart",
        "parameters": 3_210_000,
        "active_parameters": 1_840_000,
        "total_steps": 244,
        "total_tokens": 1_000_000,
        "layout": "2 x cpu, expert parallel 2, ZeRO-1, fp32",
        "run_dir": Path("runs/quickstart"),
        "dashboard": "wandb leet runs/quickstart/wandb",
    }
    fresh = start_lines(**facts, resumed_step=None)
    assert fresh == [
        "quickstart: 3.2M parameters, 1.8M active per token",
        "  plan    244 steps, 1.0M tokens",
        "  layout  2 x cpu, expert parallel 2, ZeRO-1, fp32",
        "  files   runs/quickstart",
        "  watch   wandb leet runs/quickstart/wandb",
    ]
    resumed = start_lines(**facts, resumed_step=120)
    assert resumed[3] == "  files   runs/quickstart, resumed after step 120"
    assert resumed[:3] + resumed[4:] == fresh[:3] + fresh[4:]
    begun = start_lines(**facts, resumed_step=None, begun_from=Path("runs/a/checkpoints/step-9"))
    assert begun[3] == "  files   runs/quickstart, started from the weights of runs/a/checkpoints/step-9"


@pytest.mark.parametrize(
    ("finished", "stop_step", "how"),
    [
        (True, 100, "finished"),
        (False, None, "stopped (the same command continues from here)"),
        (False, 150, "stopped (the same command continues from here)"),
        (False, 100, "stopped at stop_step=100 (continue with a later one, or with null)"),
    ],
)
def test_end_lines(finished, stop_step, how):
    lines = end_lines(
        finished=finished,
        step=100,
        total_steps=244,
        stop_step=stop_step,
        seconds=3661,
        run_dir=Path("runs/q"),
        dashboard="URL",
    )
    if finished:
        assert lines == [f"{how}: step 100/244, 1:01:01", "  files   runs/q", "  watch   URL"]
    else:
        assert lines == [f"{how}: step 100/244, 1:01:01, runs/q"]
