"""What a run prints: pure functions from numbers to lines; train.py prints them from rank 0."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


@contextmanager
def without_warnings_logged() -> Iterator[None]:
    """For imports of DeepSpeed, which tells every rank that it has no GPU."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def fmt_count(number: float) -> str:
    """A count or a rate for people: 812, 9.5, 12.3K, 3.2M, 15.7B, 1.5T."""
    if not math.isfinite(number):
        return str(number)
    for size, suffix in _SUFFIXES:
        # 999,950 rounds up to 1000.0K, so it already belongs to the larger unit.
        if abs(number) >= size * 0.99995:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}" if number == round(number) or abs(number) >= 99.95 else f"{number:.1f}"


def fmt_time(seconds: float | None) -> str:
    """A duration in seconds as h:mm:ss, from a day on as 2d 03:04:05; None or not finite is "?"."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def step_line(
    *,
    step: int,
    total_steps: int,
    loss: float,
    grad_norm: float,
    lr: float,
    tok_s: float,
    mem_gib: float,
    eta_s: float | None,
    mfu: float | None = None,
) -> str:
    """One training step.

    Args:
        loss: nats a token, balance losses included.
        grad_norm: global norm before clipping.
        tok_s: tokens a second over all ranks.
        mem_gib: peak memory of rank 0's process: CUDA's on a GPU, resident otherwise.
        eta_s: seconds to the last step, None where there is no estimate yet.
        mfu: share 0..1 of the GPU's peak, None where the peak is unknown (CPU).
    """
    fields = [
        _progress("step", step, total_steps),
        f"loss {loss:.3f}",
        f"gnorm {grad_norm:.2f}",
        f"lr {lr:.2e}",
        f"{fmt_count(tok_s)} tok/s",
        *([] if mfu is None else [f"mfu {mfu:.1%}"]),
        f"mem {mem_gib:.1f} GiB",
        f"eta {fmt_time(eta_s)}",
    ]
    return "  ".join(fields)


def eval_line(*, step: int, total_steps: int, loss: float, bits_per_byte: float | None = None) -> str:
    """One evaluation: loss in nats a token, bits per byte where the data knows its bytes."""
    bpb = [] if bits_per_byte is None else [f"bpb {bits_per_byte:.3f}"]
    return "  ".join([_progress("eval", step, total_steps), f"loss {loss:.3f}", *bpb])


def start_lines(
    *,
    name: str,
    parameters: int,
    active_parameters: int,
    total_steps: int,
    total_tokens: int,
    layout: str,
    run_dir: Path,
    resumed_step: int | None,
    begun_from: Path | None = None,
    dashboard: str,
) -> list[str]:
    """What is about to run.

    Args:
        active_parameters: those one token uses.
        layout: the ranks and how they split the work, such as "2 x cpu, expert parallel 2, ZeRO-1, fp32".
        resumed_step: the checkpoint's step, None for a fresh start.
        begun_from: the checkpoint of another run, or the Hugging Face folder, that this one begins with.
        dashboard: `Tracker.dashboard_hint`.
    """
    resumed = "" if resumed_step is None else f", resumed after step {resumed_step}"
    if begun_from is not None:
        resumed = f", begun with the weights of {begun_from}"
    return [
        f"{name}: {fmt_count(parameters)} parameters, {fmt_count(active_parameters)} active a token",
        f"  plan    {total_steps} steps, {fmt_count(total_tokens)} tokens",
        f"  layout  {layout}",
        f"  files   {run_dir}{resumed}",
        f"  watch   {dashboard}",
    ]


def end_lines(
    *,
    finished: bool,
    step: int,
    total_steps: int,
    stop_step: int | None,
    seconds: float,
    run_dir: Path,
    dashboard: str,
) -> list[str]:
    """How it went; `finished` is False where a signal or stop_step ended the run early."""
    how = "finished" if finished else "stopped (the same command goes on from here)"
    if not finished and step == stop_step:
        how = f"stopped as stop_step={step} says (a later one, or none, goes on from here)"
    return [
        f"{how}: step {step}/{total_steps}, {fmt_time(seconds)}",
        f"  files   {run_dir}",
        f"  watch   {dashboard}",
    ]


def _progress(label: str, step: int, total_steps: int) -> str:
    return f"{label} {step:>{len(str(total_steps))}}/{total_steps}"
