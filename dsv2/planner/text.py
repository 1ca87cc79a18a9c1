"""Write a plan as lines of text."""

from dsv2.config.schema import Config, Precision
from dsv2.formats import short
from dsv2.model.sizes import count_parameters, flops_per_token
from dsv2.parallel.plan import ParallelPlan
from dsv2.planner.memory import Memory
from dsv2.planner.parameters import rank_parameters
from dsv2.planner.search import MORE_GPUS, USABLE, Machines, Planned, changes, plan, smallest_change
from dsv2.planner.speed import ARITHMETIC, LINKS, traffic

GIB = 2**30
MIB = 2**20


def _words(words: dict[str, object]) -> str:
    return " ".join(f"{word}={value}" for word, value in words.items())


def _title(planned: Planned) -> str:
    config = planned.config
    machines = planned.machines
    parallel = config.parallel
    activations = "activations recomputed" if config.runtime.recompute else "activations kept"
    return (
        f"{config.name}: {machines.gpus} x {machines.gpu.name}, expert parallel "
        f"{parallel.expert_parallel_size}, ZeRO-{parallel.zero_stage}, {config.runtime.precision.value}, "
        f"micro-batch {config.runtime.micro_batch_size} x {config.data.sequence_length} tokens, "
        f"{activations}, {config.runtime.kernels} kernels"
    )


def _parameter_line(planned: Planned) -> str:
    model = planned.config.model
    counts = count_parameters(model)
    held = rank_parameters(model, ParallelPlan.of(planned.config.parallel, planned.machines.gpus))
    return (
        f"parameters  {short(counts.total)}, {short(counts.active)} active per token; a rank computes with "
        f"{short(held.elements)} ({short(held.dense)} and {short(held.experts.elements)} of routed experts)"
    )


def _memory_lines(needed: Memory, machines: Machines) -> list[str]:
    states = needed.states
    kept = needed.activations.kept
    rows = {
        "weights": states.weights,
        "gradients": states.gradients,
        "fp32 weights": states.masters,
        "optimizer states": states.moments,
        "buffers": states.buffers,
        "in a step: gradients": needed.step_gradients,
        "in a step: buffers and copies": needed.step_buffers,
        "activations: kept": kept,
        "activations: added at the peak": needed.activations.peak - kept,
        "  (added at the logits)": needed.activations.logits,
    }
    lines = [f"  {name:<31}{size / GIB:9.2f}" for name, size in rows.items() if size]
    phases = "  ".join(f"{name} {size / GIB:.1f}" for name, size in needed.phases.items())
    gpu = machines.gpu
    usable = f"{machines.usable / GIB:.1f} ({USABLE:.0%} of the {gpu.name}'s {gpu.memory / GIB:.0f})"
    return [
        "memory per rank, GiB",
        *lines,
        f"  {'peak':<31}{needed.peak / GIB:9.2f}   of {usable}, during {needed.peak_phase}",
        f"  {phases}",
    ]


def _verdict(planned: Planned) -> list[str]:
    return ["it fits"] if planned.fits else [f"it does NOT fit; {_advice(planned)}"]


def _advice(planned: Planned) -> str:
    """Say which smallest change makes a layout fit, or that no layout fits."""
    fitting = smallest_change(planned)
    if fitting is None:
        gpus = planned.machines.gpus * MORE_GPUS[-1]
        batch = planned.config.optim.batch_size
        limit = f"; optim.batch_size={batch} allows no more GPUs" if batch < gpus else ""
        return f"no layout of up to gpus={min(gpus, batch)} fits{limit}"
    words = _words(changes(planned, fitting))
    needed = f"{fitting.memory.peak / GIB:.1f} GiB, {fitting.speed.days:.1f} days"
    return f"the smallest change that fits: {words} ({needed})"


def _work_lines(planned: Planned) -> list[str]:
    config = planned.config
    machines = planned.machines
    all_to_all = traffic(config, machines.gpus_per_node)
    lines = [
        "work per token",
        f"  arithmetic  {flops_per_token(config.model, config.data.sequence_length) / 1e9:.1f} GFLOP",
    ]
    if config.parallel.expert_parallel_size == 1:
        return [*lines, "  all-to-all  none"]
    model = config.model
    lines.append(
        f"  all-to-all  {all_to_all.sent / MIB:.2f} MiB sent, "
        f"{all_to_all.between_machines / MIB:.2f} MiB of it to other machines; "
        f"a token reaches {all_to_all.ranks:.2f} ranks"
    )
    if model.topk_group < model.n_group:
        limit = f"{model.topk_group} of {model.n_group} groups"
        lines.append(
            f"              without the limit to {limit}: {all_to_all.sent_unlimited / MIB:.2f} MiB sent"
        )
    return lines


def _time_lines(planned: Planned) -> list[str]:
    config = planned.config
    speed = planned.speed
    tokens = config.optim.batch_size * config.data.sequence_length
    parts = (
        f"arithmetic {speed.arithmetic_s:.2f}, all-to-all {speed.all_to_all_s:.2f}, "
        f"gradients and weights {speed.states_s:.2f}"
    )
    if planned.machines.mfu is None:
        title = f"time, estimated ({ARITHMETIC:.0%} of the GPU's peak, {LINKS:.0%} of its links')"
        step = f"  step        {speed.step_s:.2f} s for {short(tokens)} tokens: {parts}"
    else:
        title = f"time, at mfu={planned.machines.mfu:g}"
        step = f"  step        {speed.step_s:.2f} s for {short(tokens)} tokens"
    if config.runtime.precision is Precision.fp32 and planned.machines.mfu is None:
        title += "; the peak is bf16's, which fp32 does not reach"
    return [
        title,
        step,
        f"  rate        {short(speed.tokens_per_s)} tokens/s, MFU {speed.mfu:.1%}",
        f"  run         {speed.days:.1f} days for {short(config.optim.total_tokens)} tokens; "
        f"{short(speed.gpu_hours_per_trillion)} GPU-hours per trillion tokens",
    ]


def plan_lines(planned: Planned) -> list[str]:
    """Return all lines that describe one layout."""
    return [
        _title(planned),
        _parameter_line(planned),
        *_memory_lines(planned.memory, planned.machines),
        *_verdict(planned),
        *_work_lines(planned),
        *_time_lines(planned),
    ]


def search_lines(config: Config, machines: Machines, fitting: list[Planned], most: int = 20) -> list[str]:
    """Return the layouts that fit as a table, fastest first; it shows the first `most`."""
    title = f"{config.name} on {machines.gpus} x {machines.gpu.name}: {len(fitting)} layouts fit"
    if not fitting:
        return [f"{title} into {machines.usable / GIB:.1f} GiB; {_advice(plan(config, machines))}"]
    lines = [f"{title}, fastest first" + (f"; {most} are shown" if len(fitting) > most else "")]
    lines.append("  peak GiB  step s    MFU    days  words")
    for layout in fitting[:most]:
        speed = layout.speed
        words = {word: value for word, value in layout.words().items() if word != "gpus"}
        lines.append(
            f"  {layout.memory.peak / GIB:8.1f} {speed.step_s:7.2f} {speed.mfu:6.1%} {speed.days:7.1f}  "
            f"{_words(words)}"
        )
    return lines
