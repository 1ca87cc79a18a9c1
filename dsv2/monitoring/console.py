"""What a run prints: pure functions from numbers to lines; train.py prints them from rank 0."""

from pathlib import Path

from dsv2.formats import fmt_count, fmt_time


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
