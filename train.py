"""Train a DeepSeek-V2-style model: read the configuration, build the model, run the loop.

    torchrun --standalone --nproc_per_node=2 train.py experiment=quickstart optim.lr=1e-3

dsv2/config/schema.py explains every field of the configuration. `python -m dsv2` prints the exit codes.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from filelock import FileLock
from omegaconf import DictConfig

from data.output import make_printing_safe
from dsv2.cli.base import EXPECTED, ExitCode, exit_code
from dsv2.cli.console_log import begin_log
from dsv2.cli.failure import end, job_folder, tell
from dsv2.config.compose import check_composition, register_schema, to_config
from dsv2.config.mistakes import COMPOSITION_ERRORS, check_command_line, explain
from dsv2.config.schema import Config
from dsv2.config.typed import as_typed
from dsv2.errors import CheckpointError, Diverged, PeerLost, UserError
from dsv2.parallel.environment import (
    launched_ranks,
    local_processes,
    stop_with_launcher,
    without_warnings_logged,
)
from dsv2.parallel.progress import Part
from dsv2.planner.fit import check_machine
from dsv2.training.out_of_memory import memory_explained
from dsv2.training.rundir import claim
from dsv2.training.start import check_files, find_start
from dsv2.training.validate import validate

if TYPE_CHECKING:
    from dsv2.parallel.mesh import Mesh
    from dsv2.training.start import Start


def train(config: Config) -> None:
    """Do the whole job of this rank."""
    rank, world_size = launched_ranks()
    validate(config, world_size)
    device = check_machine(config, world_size, local_processes())
    check_files(config)
    # Torch and DeepSpeed take seconds to import, so all that can be checked without them is checked first.
    if rank == 0:
        print("importing torch and DeepSpeed", flush=True)
    with without_warnings_logged():
        from dsv2.parallel.start import end_process_group
        from dsv2.parallel.watchdog import Watchdog
        from dsv2.training.job import join

    start = find_start(config)  # mistakes in files are told before there is any process group
    _lock = hold(config.run_dir) if rank == 0 else None
    mesh = join(config, rank, world_size, device)
    with Watchdog(config.watchdog, mesh, config.run_dir, end=partial(abandon, config.run_dir)):
        run(config, mesh, start)
    end_process_group()


def hold(run_dir: Path) -> FileLock:
    """Hold the run's folder while the returned lock lives, and begin this session's part of console.log."""
    lock = claim(run_dir)
    begin_log(run_dir, job_folder())
    return lock


def abandon(run_dir: Path, message: str) -> NoReturn:
    """End this process from another thread: tell why, and note it in the run's folder."""
    from dsv2.monitoring.status import mark_failed

    tell(PeerLost(message), ExitCode.error)
    mark_failed(run_dir)
    os._exit(ExitCode.error)  # the main thread may never return


def run(config: Config, mesh: "Mesh", start: "Start") -> None:
    """Build, train and evaluate the model."""
    with without_warnings_logged():
        from dsv2.monitoring.monitor import Monitor
        from dsv2.monitoring.tracker import open_tracker
        from dsv2.profiling.profiler import Profiler
        from dsv2.training.batches import share_of_step
        from dsv2.training.job import build_job
        from dsv2.training.saver import Saver
        from dsv2.training.schedule import plan_step
        from dsv2.training.signals import StopSignals
        from dsv2.training.spikes import SpikeGuard

    engine, store, stream, evaluator, state, loaded = build_job(config, mesh, start)
    with (
        StopSignals(mesh) as stop,
        open_tracker(config, wandb_id=state.wandb_id, is_main=mesh.is_main) as tracker,
        Monitor(config, mesh, tracker, state, loaded) as monitor,
        Saver(engine, store, asynchronous=config.checkpoint.asynchronous) as saver,
        Profiler(config, engine, stream) as profiler,
    ):
        state = replace(state, wandb_id=tracker.wandb_id)
        guard = SpikeGuard(config.spike, state.spikes)
        while plan := plan_step(config.optim, config.data.sequence_length, state.step, state.tokens):
            mesh.progress.enter(Part.data, plan.step + 1)
            with profiler.step(plan.step + 1):
                batches = share_of_step(stream, plan.batch_size, config.runtime.micro_batch_size, mesh)
                result = engine.train_step(batches, plan.lr, guard.judge(plan.step + 1))
            if guard.asks_to_rewind(result):
                monitor.saved(saver.wait())
                state = guard.rewind(state, saver.load_newest())
                monitor.rewound(plan, result, state)
                continue
            state = state.after(plan.step + 1, plan.tokens_after)
            monitor.step(plan, result, guard.counts)  # raises Diverged
            monitor.profiled(profiler.finish())
            monitor.saved(saver.finished())
            is_last = state.tokens >= config.optim.total_tokens or stop.requested()
            if is_due(config.eval.every, state.step) and not is_last:
                monitor.evaluation(state.step, evaluator.evaluate())
                is_last = stop.requested()
            is_last = is_last or state.step == config.stop_step
            if is_due(config.checkpoint.every, state.step) or is_last:
                state = replace(state, data=stream.state_dict(), spikes=guard.state_dict())
                monitor.saved(saver.save(state, is_last=is_last))
            if is_last:
                break
        if state.tokens >= config.optim.total_tokens:
            monitor.final(evaluator.evaluate(), evaluator.sample())


def is_due(every: int, step: int) -> bool:
    """Return whether a job that runs every `every` steps runs after this one; 0 means never."""
    return every > 0 and step % every == 0


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def command_line(composed: DictConfig) -> None:
    """Run as Hydra's entry. Print an expected error as one line and exit; let others show their traceback."""
    try:
        config = to_config(composed)
        with memory_explained(config):
            train(config)
    except COMPOSITION_ERRORS as error:
        end(explain(error, sys.argv[1:]), ExitCode.mistake)
    except OSError as error:  # such as a full disk, or a file that may not be read or written
        end(error, ExitCode.error)
    except KeyboardInterrupt:  # during training, Ctrl-C sets a flag and does not raise
        end(UserError("interrupted before training began; nothing was changed"), ExitCode.interrupted)
    except EXPECTED as error:
        # All ranks raise CheckpointError and Diverged at the same point, so they can leave together.
        end(error, exit_code(error), together=isinstance(error, CheckpointError | Diverged))


if __name__ == "__main__":
    make_printing_safe()
    register_schema()
    stop_with_launcher()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises composition errors instead of printing them
    try:
        check_command_line(sys.argv[1:], read_by_hydra=True)
        check_composition(sys.argv[1:])
        sys.argv[1:] = map(as_typed, sys.argv[1:])
        command_line()
    except COMPOSITION_ERRORS as mistake:
        end(explain(mistake, sys.argv[1:]), ExitCode.mistake)
    except UserError as mistake:
        end(mistake, ExitCode.mistake)
