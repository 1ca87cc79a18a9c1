"""Train the missing runs of a study, several at a time, and write the study's tables."""

import itertools
import json
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from dsv2.studies import jobs
from dsv2.studies.jobs import Job
from dsv2.studies.table import figures, markdown, summary


def run_study(study: str, *, seeds: int, at_once: int, out: Path, overrides: list[str]) -> int:
    """Train the missing runs and write the tables to `out`; return the exit code, 1 if a run failed."""
    planned = jobs.plan(study, seeds, out, overrides)
    finished = [job for job in planned if jobs.is_finished(job)]
    for job in finished:
        print(f"{job.config.name}: already finished", flush=True)
    missing = [job for job in planned if job not in finished]
    if missing and (code := jobs.refused(missing[0])):
        return code
    out.mkdir(parents=True, exist_ok=True)
    failed = _run_all(missing, at_once, finished_before=len(finished))
    result = summary(study, planned, overrides, at_once)
    (out / "table.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(result), encoding="utf-8")
    print(f"{out / 'table.md'}\n\n{markdown(result)}")
    if failed:
        print(f"error: {len(failed)} of {len(planned)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run_all(missing: list[Job], at_once: int, finished_before: int) -> list[str]:
    """Run the jobs and print a line for each; return the names of those that failed."""
    failed: list[str] = []
    if not missing:
        return failed
    total = finished_before + len(missing)
    gpus = itertools.cycle(jobs.gpus(missing[0].config) or [None])
    started: dict[Future[tuple[int, float]], Job] = {}
    with ThreadPoolExecutor(at_once) as pool:
        for job in missing:
            started[pool.submit(_timed_run, job, next(gpus))] = job
        try:
            for count, done in enumerate(as_completed(started), start=finished_before + 1):
                job = started[done]
                code, seconds = done.result()
                progress = f"{count}/{total} {job.config.name}"
                if code == 0 and jobs.is_finished(job):
                    shutil.rmtree(job.run_dir / "checkpoints")
                    loss = figures(job.run_dir)["val/loss"]
                    print(f"{progress}: validation loss {loss:.4f}, {seconds:.0f} s", flush=True)
                else:
                    failed.append(job.config.name)
                    print(f"{progress}: ended with exit code {code}; see {job.run_dir}.log", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # running jobs received the interrupt too, and save
            raise
    return failed


def _timed_run(job: Job, gpu: str | None) -> tuple[int, float]:
    """Train the run; return its exit code and its seconds."""
    start = time.monotonic()
    return jobs.run(job, gpu), time.monotonic() - start
