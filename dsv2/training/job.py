"""Join the other ranks, and build everything that the training loop works with."""

from dataclasses import replace
from typing import NamedTuple

import torch

from data.streams.base import Stream
from data.streams.sources import build_stream
from dsv2.checkpoint.state import Loaded, RunState
from dsv2.checkpoint.store import CheckpointStore
from dsv2.config.schema import Config
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim, ParallelPlan
from dsv2.parallel.start import start_mesh
from dsv2.parallel.watchdog import record_collectives
from dsv2.training.build import build_model, start_transport
from dsv2.training.engine import Engine
from dsv2.training.evaluate import Evaluator
from dsv2.training.start import Start


class Job(NamedTuple):
    """One rank's part of a run, at the step where the run begins or resumes."""

    engine: Engine
    store: CheckpointStore
    stream: Stream
    evaluator: Evaluator
    state: RunState
    loaded: Loaded | None  # the checkpoint that the run resumes from


def join(config: Config, rank: int, world_size: int, device: str) -> Mesh:
    """Start the process group. Collective."""
    record_collectives(config.run_dir)
    return start_mesh(ParallelPlan.of(config.parallel, world_size), rank, torch.device(device))


def build_job(config: Config, mesh: Mesh, start: Start) -> Job:
    """Build the model, and load the checkpoint if there is one. Collective.

    Raises:
        UserError: the checkpoint is damaged, and there is no older one.
    """
    store, checkpoint, weights = start
    mesh.print(f"building the model{f' with the weights of {config.init_from}' if weights else ''}")
    transport = start_transport(config, mesh)
    model = build_model(config.model, config.runtime, config.seed, mesh, weights=weights, transport=transport)
    engine = Engine(model, config.optim, config.parallel, config.runtime, mesh)
    stream = build_stream(config.data, config.model.vocab_size, mesh[Dim.dp])
    evaluator = Evaluator(engine, config)
    if checkpoint:
        mesh.print(f"loading {checkpoint.path}")
    loaded = engine.load(store, checkpoint) if checkpoint else None
    state = replace(loaded.state if loaded else RunState(), tokenizer=evaluator.tokenizer.record())
    if state.data is not None:
        stream.load_state_dict(state.data)
    return Job(engine, store, stream, evaluator, state=state, loaded=loaded)
