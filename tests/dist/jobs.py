"""What the pool's processes run, and the one-process reference they are compared with."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from data.config import DataConfig
from data.streams.base import Batch
from dsv2.config.compose import to_plain
from dsv2.config.schema import (
    BalanceConfig,
    Config,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    RuntimeConfig,
)
from tests.dist.traces import COUNTS, SUMS, Trace, kept_pairs

SEQUENCE = 12  # tokens
BATCH = 8  # sequences a step


def model_config(**changes: Any) -> ModelConfig:
    """Everything on, and small: query compression, 4 groups of 2 experts, 3 losses of notable weight."""
    sizes = ModelConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        intermediate_size=32,
        moe_intermediate_size=10,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.0,
        initializer_range=0.2,
        balance=BalanceConfig(alpha_expert=0.1, alpha_device=0.2, alpha_comm=0.3, exempt_fraction=0.25),
    )
    balance = {k: v for k, v in changes.items() if hasattr(sizes.balance, k)}
    sizes.balance = replace(sizes.balance, **balance)
    return replace(sizes, **{k: v for k, v in changes.items() if k not in balance})


SETTINGS = to_plain(Config(model=model_config(), data=DataConfig(path="nowhere")))
# Adam divides by a root of tiny squares in its first steps, which enlarges rounding; eps bounds it.
OPTIM = OptimConfig(lr=3e-3, eps=1e-4, grad_clip=0.5, batch_size=BATCH)


def global_batch(step: int, length: int = SEQUENCE) -> Batch:
    """The same BATCH sequences for every layout."""
    generator = np.random.default_rng(step)
    tokens = torch.from_numpy(generator.integers(0, 61, (BATCH, length + 1)))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(step * BATCH, (step + 1) * BATCH))


def cut(batch: Batch, start: int, count: int) -> Batch:
    part = slice(start, start + count)
    return Batch(batch.input_ids[part], batch.labels[part], batch.sequence_ids[part])


def tie_routers(model: nn.Module) -> None:
    """Equal affinities everywhere: all tokens go to the same experts, the others get none."""
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.zero_()


@functools.cache
def reference(
    steps: int,
    micro_batches: int = 1,
    sizes: tuple[int, ...] = (),
    init_from: str | None = None,
    length: int = SEQUENCE,
    tied: bool = False,
    eps: float = OPTIM.eps,
    **changes: Any,
) -> Trace:
    """The same run in this process with plain torch: no DeepSpeed, no process group."""
    from dsv2.hf.init_from import HFWeights
    from dsv2.model.init import init_weights
    from dsv2.model.transformer import DeepseekV2

    config = model_config(**changes)
    model = DeepseekV2(config)
    init_weights(model, config.initializer_range, seed=0)
    if init_from:
        HFWeights(Path(init_from), config).fill(model)
    if tied:
        tie_routers(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=eps)
    trace = Trace()
    for step in range(steps):
        optimizer.zero_grad()
        size = (sizes[step] if sizes else BATCH) // micro_batches
        batch = global_batch(step, length)
        with kept_pairs(model) as kept:
            outputs = [model(*vars(cut(batch, i * size, size)).values()) for i in range(micro_batches)]
        trace.kept |= kept
        torch.stack([out.loss for out in outputs]).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        trace.losses.append(float(np.mean([out.loss.item() for out in outputs])))
        trace.lm_losses.append(float(np.mean([out.lm_loss.item() for out in outputs])))
        trace.balance.append(np.mean([torch.stack(list(out.balance)).numpy() for out in outputs], axis=0))
        trace.grad_norms.append(float(norm))
        sums = {name: sum(getattr(out.stats, name) for out in outputs) for name in COUNTS + SUMS}
        trace.routing.append({name: total.numpy() for name, total in sums.items()})
        if step == 0:
            trace.first_moment = {
                n: optimizer.state[p]["exp_avg"].flatten().numpy().copy() for n, p in model.named_parameters()
            }
    trace.weights = {n: p.detach().flatten().numpy().copy() for n, p in model.named_parameters()}
    return trace


def make_engine(
    rank: int,
    world_size: int,
    ep: int,
    stage: int,
    micro_batch: int,
    recompute: bool = False,
    bf16: bool = False,
    states: Precision = Precision.fp32,
    init_from: str | None = None,
    tied: bool = False,
    **changes: Any,
) -> Any:
    from dsv2.hf.init_from import HFWeights
    from dsv2.parallel.plan import ParallelPlan
    from dsv2.parallel.start import start_mesh
    from dsv2.training.build import build_model
    from dsv2.training.engine import Engine

    mesh = start_mesh(ParallelPlan(world=world_size, ep=ep), rank, torch.device("cpu"))
    parallel = ParallelConfig(expert_parallel_size=ep, zero_stage=stage)
    runtime = RuntimeConfig(
        micro_batch_size=micro_batch,
        recompute=recompute,
        precision=Precision.bf16 if bf16 else Precision.fp32,
    )
    config = model_config(**changes)
    weights = HFWeights(Path(init_from), config) if init_from else None
    model = build_model(config, runtime, 0, mesh, weights)
    if tied:
        tie_routers(model)
    return Engine(model, replace(OPTIM, states=states), parallel, runtime, mesh)


def owned(engine: Any, key: str) -> list[tuple[str, int, int, np.ndarray]]:
    """(name, offset, total, values) of this rank's fragments of fp32 weights or a moment."""
    return [
        (shard.name, shard.offset, shard.total, shard.tensors[key].float().cpu().numpy().copy())
        for shard in engine.sharded.shards()
        if key in shard.tensors
    ]


class OneBatch:
    """A stream that hands out one global batch."""

    def __init__(self, batch: Batch):
        self.batch, self.consumed = batch, 0

    def take(self, total: int, start: int, count: int) -> Batch:
        self.consumed += total
        return cut(self.batch, self.consumed - total + start, count)


def steps_of(
    engine: Any,
    first: int,
    steps: int,
    micro_batch: int,
    sizes: tuple[int, ...] = (),
    length: int = SEQUENCE,
) -> Trace:
    """Train and record; gathers nothing but the statistics' sums. `sizes`: sequences of each step."""
    from dsv2.parallel.plan import Dim
    from dsv2.training.batches import share_of_step

    trace = Trace()
    for step in range(first, first + steps):
        stream: Any = OneBatch(global_batch(step, length))
        share = share_of_step(stream, sizes[step] if sizes else BATCH, micro_batch, engine.mesh)
        with kept_pairs(engine.model) as kept:
            result = engine.train_step(share, OPTIM.lr)
        trace.kept |= kept
        trace.losses.append(result.loss)
        trace.lm_losses.append(result.lm_loss)
        trace.balance.append(torch.stack(list(result.balance)).numpy())
        trace.grad_norms.append(result.grad_norm)
        sums = {name: engine.mesh[Dim.world].sum(getattr(result.stats, name)) for name in COUNTS + SUMS}
        trace.routing.append({name: total.numpy() for name, total in sums.items()})
    return trace


def train(
    rank: int,
    world_size: int,
    steps: int,
    sizes: tuple[int, ...] = (),
    length: int = SEQUENCE,
    **layout: Any,
) -> tuple[Trace, list, list]:
    """The run on one layout: its trace, this rank's first moments after one step, and final weights."""
    engine = make_engine(rank, world_size, **layout)
    first = steps_of(engine, 0, 1, layout["micro_batch"], sizes, length)
    moments = owned(engine, "exp_avg")
    rest = steps_of(engine, 1, steps - 1, layout["micro_batch"], sizes, length)
    for name in ("losses", "lm_losses", "balance", "grad_norms", "routing"):
        getattr(first, name).extend(getattr(rest, name))
    first.kept |= rest.kept
    return first, moments, owned(engine, "fp32")


def types_reduced(rank: int, world_size: int, **layout: Any) -> set[torch.dtype]:
    """Of what is added up over the ranks in a step: the types of tensors as large as gradients."""
    import torch.distributed as dist

    engine = make_engine(rank, world_size, **layout)
    with patch.object(dist, "reduce_scatter_tensor", wraps=dist.reduce_scatter_tensor) as reduce_scatter:
        steps_of(engine, 0, 1, layout["micro_batch"])
    return {call.args[1].dtype for call in reduce_scatter.call_args_list if call.args[1].numel() > 1000}


def save(engine: Any, store: Any, state: Any) -> None:
    """Save a checkpoint, and return when it is complete."""
    from dsv2.parallel.plan import Dim

    store.save(engine.snapshot(state), engine.mesh[Dim.world])


def train_and_save(rank: int, world_size: int, folder: str, save_at: int, steps: int, **layout: Any) -> tuple:
    """Train `steps` steps and save after `save_at` of them: (trace, final weights' parts, random state)."""
    from dsv2.checkpoint.state import RunState
    from dsv2.checkpoint.store import CheckpointStore

    engine = make_engine(rank, world_size, **layout)
    trace = steps_of(engine, 0, save_at, layout["micro_batch"])
    torch.manual_seed(1000 + rank)  # every rank's own
    random_state = torch.get_rng_state().numpy()
    state = RunState(step=save_at, tokens=save_at * BATCH * SEQUENCE, data={"consumed": 1}, wandb_id="w")
    save(engine, CheckpointStore(Path(folder), 3, SETTINGS), state)
    trace.losses += steps_of(engine, save_at, steps - save_at, layout["micro_batch"]).losses
    return trace, owned(engine, "fp32"), random_state


def load_and_train(rank: int, world_size: int, path: str, steps: int, **layout: Any) -> tuple:
    """Load into a fresh engine whose weights differ and train on.

    Returns the state, the trace, the final weights' parts, the random state after the load.
    """
    from dsv2.checkpoint.state import Found, RunState
    from dsv2.checkpoint.store import CheckpointStore

    engine = make_engine(rank, world_size, **layout)
    steps_of(engine, 100, 1, layout["micro_batch"])  # so that a tensor the load forgets shows
    torch.manual_seed(0)
    found = Found(Path(path), RunState(), [], [], {})
    state = engine.load(CheckpointStore(Path(path).parent, 3, SETTINGS), found).state
    random_state = torch.get_rng_state().numpy()
    trace = steps_of(engine, state.step, steps - state.step, layout["micro_batch"])
    return state, trace, owned(engine, "fp32"), random_state
