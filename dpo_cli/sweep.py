"""A sweep (-m): every job in a process of its own, one table at the end.

Hydra's sweeper makes the jobs and its launcher (local, joblib, submitit) calls `run_job`
for each, here or on another machine; what is known of a job comes back as a file.

    <sweep folder>/0/ 1/ ...     the run folders        jobs/0.json ...  how each job ended
                   multirun.yaml what Hydra composed    sweep.csv        all numbers
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpo_cli.durable import write_json, write_text
from dpo_cli.errors import ConfigError, RunLockedError
from dpo_cli.launch import as_override, run_child, shell_status
from dpo_cli.run_folder import (
    composed_with,
    is_used,
    key_of,
    make,
    read_json,
    task_overrides,
    unique_name,
)

JOBS = "jobs"


def claim(chosen: str) -> Path:
    """The sweep's folder, `chosen` or a new one; no two sweeps get the same."""
    folder = Path(chosen or f"runs/sweep-{unique_name()}")
    if is_used(folder):
        raise ConfigError(f"hydra.sweep.dir={folder}: is not empty; choose another folder")
    make(folder)
    try:
        (folder / JOBS).mkdir()  # of two that found the folder empty, one gets here
    except FileExistsError:
        raise RunLockedError(f"{folder}: another sweep has just started there") from None
    return folder


def run_job(cfg: DictConfig) -> float:
    """Hydra's task function: run one job and return its `objective` for the sweeper.

    A failing job is recorded and the sweep goes on; NaN tells a sweeper that it failed.
    """
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    whole = cast(DictConfig, HydraConfig.instance().cfg)
    words = task_overrides(whole)
    print(f"[job {hydra.job.num}] {' '.join(words)} -> {run_dir}", flush=True)
    code, stopped = run_child([*words, as_override("run_dir", str(run_dir)), *composed_with(whole)])
    summary = read_json(run_dir / "summary.json")
    record = {
        "job": int(hydra.job.num),
        "overrides": {key_of(word): word.partition("=")[2] for word in words},
        "exit_code": code,
        "summary": {k: v for k, v in summary.items() if isinstance(v, (int, float))},
        "run_dir": str(run_dir),
    }
    write_json(Path(hydra.sweep.dir) / JOBS / f"{hydra.job.num}.json", record)
    if stopped:
        raise KeyboardInterrupt  # not an Exception: Hydra would go on to the next job
    return objective(run_dir, summary) if code == 0 else math.nan


def objective(run_dir: Path, summary: Mapping[str, Any]) -> float:
    """What a sweeper optimises: the best held-out value of a training (train.best_metric),
    the mean reward of an evaluation, NaN where there is neither."""
    value = read_json(run_dir / "best.json").get("value", summary.get("reward"))
    return float(value) if isinstance(value, (int, float)) else math.nan


def finish(folder: Path) -> int:
    """Print the table, write sweep.csv; 0 or the exit code of the first job that failed."""
    from rich.console import Console

    from dpo_cli.report.compare import sweep_table

    jobs = recorded_jobs(folder)
    if not jobs:
        return 0
    table, text = sweep_table(jobs)
    Console().print(table)
    write_text(folder / "sweep.csv", text)
    print(f"numbers of all jobs: {folder / 'sweep.csv'}")
    failed = [str(job["job"]) for job in jobs if job["exit_code"] != 0]
    if failed:
        print(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}")
    return exit_code(jobs)


def exit_code(jobs: Sequence[Mapping[str, Any]]) -> int:
    """0, or the exit code of the first job that failed."""
    codes = (shell_status(int(job["exit_code"])) for job in jobs)
    return next((code for code in codes if code), 0)


def recorded_jobs(folder: Path) -> list[dict[str, Any]]:
    """The jobs that have ended, in order."""
    return sorted((read_json(path) for path in (folder / JOBS).glob("*.json")), key=_number)


def _number(job: Mapping[str, Any]) -> int:
    return int(job["job"])
