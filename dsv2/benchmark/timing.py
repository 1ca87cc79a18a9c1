"""What all contenders of a benchmark share: the tokens, the clock, and the row of figures."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.streams.sources import build_stream
from dsv2.benchmark.peers import Work
from dsv2.config.schema import Config
from dsv2.kernels.types import Choice, Routing
from dsv2.model.sizes import flops_per_token
from dsv2.moe.layer import MoELayer
from dsv2.parallel.gpus import peak_flops
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim

Step = Callable[[list[Tensor]], float]  # trains on a step's micro-batches and returns its loss


class Timing(NamedTuple):
    seconds: list[float]  # of each timed step
    loss: float  # of the last step
    peak_gib: float | None  # None on a CPU


def random_tokens(config: Config, rank: int, ranks: int) -> Iterator[list[Tensor]]:
    """Yield one rank's micro-batches of each step, [sequences, length + 1] each, with random tokens.

    Args:
        rank: among the `ranks` data-parallel ranks.
    """
    generator = torch.Generator().manual_seed(rank)
    micro = config.runtime.micro_batch_size
    while True:
        yield [
            torch.randint(
                config.model.vocab_size, (micro, config.data.sequence_length + 1), generator=generator
            )
            for _ in range(config.optim.batch_size // (micro * ranks))
        ]


def stream_tokens(config: Config, mesh: Mesh) -> Iterator[list[Tensor]]:
    """Yield this rank's micro-batches of each step, as training reads them from the configured data."""
    from dsv2.training.batches import share_of_step  # not at the top: peers do not need DeepSpeed

    stream = build_stream(config.data, config.model.vocab_size, mesh[Dim.dp])
    while True:
        batches = share_of_step(stream, config.optim.batch_size, config.runtime.micro_batch_size, mesh)
        yield [torch.cat((batch.input_ids, batch.labels[:, -1:]), dim=1) for batch in batches]


def torch_step(model: nn.Module, work: Work, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Return a step for a peer that brings only a model: loss, clipping, torch's AdamW on the weights."""
    optim = work.optim
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )

    def step(micro_batches: list[Tensor]) -> float:
        (tokens,) = micro_batches
        tokens = tokens.to(work.device)
        loss = loss_of(tokens[:, :-1], tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def balance_routing(model: nn.Module) -> None:
    """Let experts take turns, whatever the router chooses. An expert's weight is its affinity."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.gate.register_forward_hook(_in_turns)


def _in_turns(gate: nn.Module, inputs: tuple[Tensor, ...], routing: Routing) -> Routing:
    affinity_TE = routing.choice.affinity_TE
    n_tokens, top_k = routing.weights_TK.shape
    turns = torch.arange(n_tokens * top_k, device=affinity_TE.device) % affinity_TE.shape[1]
    ids_TK = turns.view(n_tokens, top_k)
    affinity_TK = affinity_TE.gather(1, ids_TK)
    return Routing(Choice(ids_TK, affinity_TK, affinity_TE), weights_TK=affinity_TK)


def time_steps(
    step: Step, tokens: Iterator[list[Tensor]], device: torch.device, steps: int, warmup: int
) -> Timing:
    """Time `steps` steps after `warmup` steps. A step starts when its tokens are fetched, as in training."""
    on_gpu = device.type == "cuda"

    def once() -> tuple[float, float]:
        start = time.perf_counter()
        loss = step(next(tokens))
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start, loss

    for _ in range(warmup):
        once()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    timed = [once() for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return Timing([seconds for seconds, _ in timed], timed[-1][1], peak)


def row(
    config: Config, device: torch.device, timing: Timing, world_size: int, precision: str
) -> dict[str, Any]:
    """Return the row of figures; all contenders' FLOPs are counted alike. `precision` is "weights/states"."""
    on_gpu = device.type == "cuda"
    seconds = statistics.median(timing.seconds)
    length = config.data.sequence_length
    tokens = config.optim.batch_size * length / world_size
    flops = tokens * flops_per_token(config.model, length) / seconds
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "precision": precision,
        "layers": config.model.num_hidden_layers,
        "micro_batch": config.runtime.micro_batch_size,
        "length": length,
        "step_ms": seconds * 1e3,
        "step_ms_all": [s * 1e3 for s in timing.seconds],
        "tok_s_gpu": tokens / seconds,
        "tflops": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "mem_gib": timing.peak_gib,
        "loss": timing.loss,
    }
