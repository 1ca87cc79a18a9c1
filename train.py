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
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dsv2.compose import explain, launched_ranks, register_schema, to_config, to_plain
from dsv2.config import Config, validate
from dsv2.errors import CheckpointError, Diverged, UserError


def train(config: Config) -> None:
    """The whole job of this rank."""
    rank, world_size = launched_ranks()
    validate(config, world_size)
    # Torch and DeepSpeed take seconds to import: they wait until the configuration makes sense.
    logging.disable(logging.WARNING)  # or every rank is told that it has no GPU
    from data.stream import build_stream, check_data
    from dsv2 import checkpoint
    from dsv2.engine import Engine, build_model, share_of_step
    from dsv2.evaluate import Evaluator
    from dsv2.monitor import Monitor
    from dsv2.optim import plan_steps
    from dsv2.parallel.deepspeed_moe import start_mesh
    from dsv2.parallel.mesh import end_process_group, pick_device
    from dsv2.signals import StopSignals

    logging.disable(logging.NOTSET)
    # What may be wrong with the files is found before any process group is made.
    run_dir, settings = Path(config.runs_dir) / config.name, to_plain(config)
    checkpoints = run_dir / "checkpoints"
    check_data(config.data, config.model.vocab_size)
    found, warnings = checkpoint.find(config.resume, checkpoints, settings)

    # Build.
    parallel = config.parallel
    mesh = start_mesh(pick_device(parallel), rank, world_size, parallel.expert_parallel_size)
    model = build_model(config.model, config.seed, parallel.activation_checkpointing, mesh)
    engine = Engine(model, config.optim, parallel, mesh)
    stream = build_stream(config.data, config.model.vocab_size, rank, world_size, mesh.cpu_group)
    evaluator = Evaluator(engine, config)
    state = checkpoint.RunState()
    if found is not None:
        state = checkpoint.load(engine.deepspeed, found, mesh)
        stream.load_state_dict(state.data)

    # Loop.
    with Monitor(config, mesh, run_dir, state, warnings) as monitor, StopSignals(mesh) as stop:
        for plan in plan_steps(config.optim, config.data.sequence_length, state.step, state.tokens):
            batches = share_of_step(stream, plan.batch_size, parallel.micro_batch_size, mesh)
            monitor.data_ready()
            result = engine.train_step(batches, plan.lr)
            monitor.step(plan, result, engine)
            state.step, state.tokens = plan.step + 1, plan.tokens + plan.batch_size * config.data.sequence_length
            finished = state.step == monitor.total_steps
            last = finished or stop.requested() or state.step == config.stop_step
            if state.step % config.eval.every == 0 and not last:
                monitor.evaluation(state.step, evaluator.evaluate())
            if last or (config.checkpoint.every and state.step % config.checkpoint.every == 0):
                state.data, state.wandb_id = stream.state_dict(), monitor.wandb_id
                try:
                    checkpoint.save(engine.deepspeed, state, settings, checkpoints, config.checkpoint.keep, mesh)
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


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def command_line(composed: DictConfig) -> None:
    """Hydra's entry: mistakes become one message and an exit code, errors keep their traceback."""
    try:
        train(to_config(composed))
    except UserError as error:
        fail(error, 2)
    except CheckpointError as error:
        fail(error, 1)
    except Diverged as error:
        fail(error, 3)


def fail(error: Exception, code: int) -> None:
    """End this process with the message, once for all ranks where all of them would print the same."""
    if launched_ranks()[0] == 0 or getattr(error, "of_one_rank", False):
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand errors of composition to us in place of printing them
    try:
        command_line()
    except (HydraException, OmegaConfBaseException) as mistake:
        fail(explain(mistake, sys.argv[1:]), 2)
