"""A sweep (-m): one process per job, and one table at the end.

Hydra's sweeper generates the jobs and its launcher (local, joblib, submitit) calls `run_job` for
each, on this or another machine; each job writes its result to a file.

    <sweep folder>/0/ 1/ ...     the run folders        jobs/0.json ...  result of each job
                   multirun.yaml Hydra's configuration  sweep.csv        all numbers
                   sweep.json    its overrides          old/0-1 ...      replaced runs of jobs

With `resume=true` a sweep continues in its folder and skips the jobs that succeeded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dpo_cli.config.literals import as_override
from dpo_cli.distributed.launch import is_secondary_node
from dpo_cli.durable import disk_errors, write_json, write_text
from dpo_cli.durable.redact import redact, unkept
from dpo_cli.errors import ConfigError
from dpo_cli.escapes import say
from dpo_cli.report.output import go_on_in
from dpo_cli.run_folder import (
    JOBS,
    SWEEP,
    clear_leftovers,
    composed_with,
    is_bare,
    is_used,
    key_of,
    make,
    read_json,
    refuse_locked,
    set_aside,
    stored_overrides,
    task_overrides,
    unique_name,
    without_secrets,
)
from dpo_cli.train.guard import run_lock
from dpo_cli.workflow.child import run_child, shell_status
from dpo_cli.workflow.state import Decision, decide, identity

STATUS = {"skip": ": finished earlier", "resume": ": resumed", "run": ""}


@contextmanager
def claimed(chosen: str, words: Sequence[str], resume: bool = False) -> Iterator[Path]:
    """Create and lock the sweep's folder, `chosen` or a new one. Raises ConfigError if it is used.

    words: the sweep's overrides, which must be the same if it is resumed.
    """
    if resume and not chosen:
        raise ConfigError(
            "resume=true: needs the sweep to resume; set hydra.sweep.dir=<its folder>"
        )
    folder = Path(chosen or f"runs/sweep-{unique_name()}")
    if not resume:
        _refuse_used(folder)
    else:
        _refuse_other(folder, words)
    make(folder)
    with run_lock(folder), _saved_without_secrets():
        if not resume:
            _refuse_used(folder)  # another sweep may have created it since
            write_json(folder / SWEEP, {"overrides": list(words)})
        go_on_in(folder)
        clear_leftovers(folder)
        for path in folder.iterdir():  # jobs of a killed sweep may still run
            if path.is_dir():
                refuse_locked(path)
        make(folder / JOBS)
        yield folder


@contextmanager
def _saved_without_secrets() -> Iterator[None]:
    """Redact secrets in what Hydra saves of a sweep (multirun.yaml) during the body."""
    real: Any = OmegaConf.save

    def save(config: Any, f: Any, resolve: bool = False) -> None:
        real(without_secrets(config), f, resolve)

    OmegaConf.save = staticmethod(save)  # type: ignore[method-assign]
    try:
        yield
    finally:
        OmegaConf.save = staticmethod(real)  # type: ignore[method-assign]


def _refuse_used(folder: Path) -> None:
    if is_used(folder):
        raise ConfigError(f"hydra.sweep.dir={folder}: is not empty; choose another folder")


def _refuse_other(folder: Path, words: Sequence[str]) -> None:
    """Raise ConfigError unless the folder's sweep was started with the same overrides."""
    if not (folder / SWEEP).is_file():
        raise ConfigError(f"resume=true: hydra.sweep.dir={folder} is not the folder of a sweep")
    before, now = (
        [word for word in listed if key_of(word) != "hydra.sweep.dir"]
        for listed in (read_json(folder / SWEEP)["overrides"], redact(list(words)))
    )
    if before != now:
        raise ConfigError(
            f"resume=true: the sweep in {folder} was started with {' '.join(before)}; use the "
            "same overrides in the same order, or choose another folder"
        )


def run_job(cfg: DictConfig) -> float:
    """Hydra's task function: run one job and return its `objective` for the sweeper.

    A failed job is recorded and returns NaN, and the sweep continues. In a resumed sweep
    `decide_job` decides whether a job is skipped, resumed or run.
    """
    hydra = HydraConfig.get()
    run_dir, folder = Path(hydra.runtime.output_dir), Path(hydra.sweep.dir)
    composed = cast(DictConfig, HydraConfig.instance().cfg)
    words = task_overrides(composed)
    start = [*words, as_override("run_dir", str(run_dir)), *composed_with(composed)]
    if is_secondary_node():
        run_child(start)
        return math.nan
    path = folder / JOBS / f"{hydra.job.num}.json"
    action = decide_job(read_json(path), words, run_dir).action
    shown = " ".join(redact(words))
    say(f"[job {hydra.job.num}] {shown} -> {run_dir}{STATUS[action]}")
    if action == "skip":
        return objective(run_dir, read_json(run_dir / "summary.json"))
    with disk_errors(path):
        path.unlink(missing_ok=True)  # it describes outputs that are about to change
    if action == "run" and not is_bare(run_dir):
        set_aside(run_dir, folder / "old" / run_dir.name)
        make(run_dir)
    resume = [f"resume={run_dir}", *unkept(words)]
    code, stopped = run_child(resume if action == "resume" else start)
    summary = read_json(run_dir / "summary.json")
    record = {
        "job": int(hydra.job.num),
        "overrides": _by_key(words),
        "exit_code": code,
        "summary": {k: v for k, v in summary.items() if isinstance(v, (int, float))},
        "run_dir": str(run_dir),
        "outputs": identity(run_dir),
    }
    write_json(path, record)
    if stopped:
        raise KeyboardInterrupt  # not an Exception, after which Hydra would start the next job
    return objective(run_dir, summary) if code == 0 else math.nan


def decide_job(record: Mapping[str, Any], words: Sequence[str], run_dir: Path) -> Decision:
    """What to do with a job. record: that of its earlier end, empty if there is none.

    A job counts as finished only if it has a record and its outputs have not changed since: a
    killed job has no record, whatever its folder contains.
    """
    finished = record.get("exit_code") == 0
    now = redact(_by_key(words))
    before = redact(record.get("overrides")) if finished else _started_with(run_dir)
    changes = "" if before == now else "with other overrides"
    return decide(run_dir, changes, record.get("outputs", "") if finished else None)


def _started_with(run_dir: Path) -> dict[str, str] | None:
    """The overrides a job's run was started with; None if its folder has no record of them."""
    try:
        stored = _by_key(stored_overrides(run_dir))
    except ConfigError:
        return None
    stored.pop("run_dir", None)
    return stored


def _by_key(words: Sequence[str]) -> dict[str, str]:
    return {key_of(word): word.partition("=")[2] for word in words}


def objective(run_dir: Path, summary: Mapping[str, Any]) -> float:
    """The value a sweeper optimizes: the best held-out value of a training run
    (train.best_metric), the mean reward of an evaluation, NaN if there is neither."""
    value = read_json(run_dir / "best.json").get("value", summary.get("reward"))
    return float(value) if isinstance(value, (int, float)) else math.nan


def finish(folder: Path) -> int:
    """Print the table and write sweep.csv; returns 0 or the exit code of the first failed job."""
    from rich.console import Console

    from dpo_cli.report.compare import sweep_table

    jobs = recorded_jobs(folder)
    if not jobs:
        return 0
    shown, everything = sweep_table(jobs)
    Console().print(shown)
    write_text(folder / "sweep.csv", everything.csv())
    say(f"numbers of all jobs: {folder / 'sweep.csv'}")
    failed = [str(job["job"]) for job in jobs if job["exit_code"] != 0]
    if failed:
        print(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}")
    return exit_code(jobs)


def exit_code(jobs: Sequence[Mapping[str, Any]]) -> int:
    """0, or the exit code of the first failed job."""
    codes = (shell_status(int(job["exit_code"])) for job in jobs)
    return next((code for code in codes if code), 0)


def recorded_jobs(folder: Path) -> list[dict[str, Any]]:
    """Records of the jobs that have ended, in order."""
    return sorted((read_json(path) for path in (folder / JOBS).glob("*.json")), key=_number)


def _number(job: Mapping[str, Any]) -> int:
    return int(job["job"])
