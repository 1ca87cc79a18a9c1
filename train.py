"""Train a DeepSeek-V2-style model: configuration, then build, then the loop.

    torchrun --standalone --nproc_per_node=2 train.py experiment=quickstart optim.lr=1e-3

Every field of the configuration is explained in dsv2/config.py. Exit codes: 0 finished, or stopped by
SIGTERM, SIGINT or stop_step after saving; 1 an error; 2 a mistake in the configuration or the data;
3 the loss is no longer a number.
"""

import logging
import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dsv2.compose import (
    COMPOSITION_ERRORS,
    check_group_choices,
    explain,
    launched_ranks,
    register_schema,
    to_config,
    to_plain,
)
from dsv2.config import Config, validate
from dsv2.errors import CheckpointError, Diverged, UserError


def train(config: Config) -> None:
    """The whole job of this rank."""
    rank, world_size = launched_ranks()
    validate(config, world_size)
    # Torch and DeepSpeed take seconds to import: they wait until the configuration makes sense.
    logging.disable(logging.WARNING)  # or every rank is told that it has no GPU
    from data.stream import build_stream, check_data
    from dsv2.checkpoint import CheckpointStore, RunState
    from dsv2.engine import Engine, build_model, share_of_step
    from dsv2.evaluate import Evaluator
    from dsv2.monitor import Monitor
    from dsv2.optim import plan_steps
    from dsv2.parallel.deepspeed_moe import start_mesh
    from dsv2.parallel.mesh import end_process_group, pick_device
    from dsv2.signals import StopSignals

    logging.disable(logging.NOTSET)
    # What may be wrong with the files is found before any process group is made.
    run_dir, parallel = Path(config.runs_dir) / config.name, config.parallel
    check_data(config.data, config.model.vocab_size)
    store = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep, to_plain(config))
    found, warnings = store.find(config.resume)

    mesh = start_mesh(pick_device(parallel), rank, world_size, parallel.expert_parallel_size)
    model = build_model(config.model, parallel, config.seed, mesh)
    engine = Engine(model, config.optim, parallel, mesh)
    stream = build_stream(config.data, config.model.vocab_size, rank, world_size, mesh.cpu_group)
    evaluator = Evaluator(engine, config)
    state = RunState()
    if found is not None:
        state = store.load(engine, found)
        stream.load_state_dict(state.data or {})
    if config.stop_step is not None and state.step >= config.stop_step:
        raise UserError(f"stop_step={config.stop_step}: the run is at step {state.step} already")

    with Monitor(config, mesh, run_dir, state, warnings) as monitor, StopSignals(mesh) as stop:
        for plan in plan_steps(config.optim, config.data.sequence_length, state.step, state.tokens):
            batches = share_of_step(stream, plan.batch_size, parallel.micro_batch_size, mesh)
            monitor.data_ready()
            result = engine.train_step(batches, plan.lr)
            monitor.step(plan, result, engine)
            state.step, state.tokens = plan.step + 1, plan.tokens_after
            last = state.step in (monitor.total_steps, config.stop_step) or stop.requested()
            if due(config.eval.every, state.step) and not last:
                monitor.evaluation(state.step, evaluator.evaluate())
            if due(config.checkpoint.every, state.step) or last:
                state.data, state.wandb_id = stream.state_dict(), monitor.wandb_id
                try:
                    store.save(engine, state)
                except CheckpointError as error:
                    if last:
                        raise
                    monitor.note(f"warning: {error}; the run goes on")
            monitor.resume_clock()
            if last:
                break
        if state.step == monitor.total_steps:
            monitor.finish(evaluator)
    end_process_group()


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def command_line(composed: DictConfig) -> None:
    """Hydra's entry: mistakes become one message and an exit code, errors keep their traceback."""
    try:
        train(to_config(composed))
    except COMPOSITION_ERRORS as error:
        fail(explain(error, sys.argv[1:]), 2)
    except UserError as error:
        fail(error, 2)
    except CheckpointError as error:
        fail(error, 1)
    except Diverged as error:
        fail(error, 3)


def fail(error: Exception, code: int) -> None:
    """End this process with the message: of rank 0, as all ranks found the same, or of the one that did."""
    if launched_ranks()[0] == 0 or (isinstance(error, UserError) and error.of_one_rank):
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand errors of composition to us in place of printing them
    try:
        check_group_choices(sys.argv[1:])
        command_line()
    except COMPOSITION_ERRORS as mistake:
        fail(explain(mistake, sys.argv[1:]), 2)
    except UserError as mistake:
        fail(mistake, 2)
