"""The lines that a run prints: pure functions from numbers to text; the monitor prints them on rank 0."""

from pathlib import Path

from dsv2.config.schema import OptimConfig
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
    """Return the line of one training step.

    Args:
        step: counted from 1.
        total_steps: of the whole run.
        loss: cross-entropy alone, as in `eval_line`: nats per token, without the balance losses.
        grad_norm: global norm before clipping.
        lr: this step's learning rate.
        tok_s: tokens per second over all ranks.
        mem_gib: peak memory of rank 0's process: CUDA's on a GPU, resident on the CPU.
        eta_s: seconds to the last step, None if there is no estimate yet.
        mfu: share of the GPU's peak, 0 to 1; None if the peak is unknown (CPU).
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
    """Return the line of one evaluation: loss in nats per token; bits per byte if the data knows them."""
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
    """Return the lines that describe the run before it starts.

    Args:
        name: of the run.
        parameters: of the whole model.
        active_parameters: the parameters that one token uses.
        total_steps: of the whole run.
        total_tokens: of the whole run.
        layout: how the ranks split the work, such as "2 x cpu, expert parallel 2, ZeRO-1, fp32".
        run_dir: the run's folder.
        resumed_step: the checkpoint's step, None for a fresh start.
        begun_from: another run's checkpoint or a Hugging Face folder, if the run starts from its weights.
        dashboard: see `Tracker.dashboard_hint`.
    """
    resumed = "" if resumed_step is None else f", resumed after step {resumed_step}"
    if begun_from is not None:
        resumed = f", started from the weights of {begun_from}"
    return [
        f"{name}: {fmt_count(parameters)} parameters, {fmt_count(active_parameters)} active per token",
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
    """Return the last lines; `finished` is False if a signal or stop_step ended the run early."""
    where = f"step {step}/{total_steps}, {fmt_time(seconds)}"
    if not finished:
        how = "stopped (the same command continues from here)"
        if step == stop_step:
            how = f"stopped at stop_step={step} (continue with a later one, or with null)"
        return [f"{how}: {where}, {run_dir}"]
    return [
        f"finished: {where}",
        f"  files   {run_dir}",
        f"  watch   {dashboard}",
    ]


def schedule_notes(
    optim: OptimConfig, *, step: int, tokens: int, total_steps: int, sequence_length: int
) -> list[str]:
    """Return notes on what may surprise in the schedule of a session that begins at this step and token."""
    notes = []
    if step == total_steps:
        if tokens >= optim.total_tokens + optim.batch_size * sequence_length:
            notes.append(
                f"note: optim.total_tokens={optim.total_tokens}: this run has already trained on more, "
                f"{tokens} tokens"
            )
        notes.append(
            "this run is finished: it is only evaluated again. A larger optim.total_tokens continues it; "
            "name=NAME starts another run"
        )
    return notes


def _progress(label: str, step: int, total_steps: int) -> str:
    return f"{label} {step:>{len(str(total_steps))}}/{total_steps}"
