"""A sweep (-m): every job in a process of its own, one table at the end.

Hydra's sweeper makes the jobs and its launcher (local, joblib, submitit) calls `run_job`
for each, here or on another machine; each job leaves its result as a file.

    <sweep folder>/0/ 1/ ...     the run folders        jobs/0.json ...  how each job ended
                   multirun.yaml what Hydra composed    sweep.csv        all numbers
                   sweep.json    its overrides          old/0-1 ...      jobs that were run again

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

SAID = {"skip": ": finished earlier", "resume": ": resumed", "run": ""}


@contextmanager
def claimed(chosen: str, words: Sequence[str], resume: bool = False) -> Iterator[Path]:
    """Hold the sweep's folder, `chosen` or a new one; no two sweeps get the same.

    words: its overrides; a sweep that is resumed must have the same.
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
            _refuse_used(folder)  # two may have found it empty at once
            write_json(folder / SWEEP, {"overrides": list(words)})
        go_on_in(folder)
        clear_leftovers(folder)
        for path in folder.iterdir():  # a killed sweep may leave its job running
            if path.is_dir():
                refuse_locked(path)
        make(folder / JOBS)
        yield folder


@contextmanager
def _saved_without_secrets() -> Iterator[None]:
    """In the body, what Hydra saves of a sweep (multirun.yaml) has its secrets blanked."""
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
            f"resume=true: the sweep in {folder} was started with {' '.join(before)}; give the "
            "same overrides in the same order, or choose another folder"
        )


def run_job(cfg: DictConfig) -> float:
    """Hydra's task function: run one job and return its `objective` for the sweeper.

    A job that fails is recorded and the sweep continues; NaN tells the sweeper that it failed. In
    a resumed sweep a job is skipped, resumed or run, as `decide_job` finds.
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
    told = " ".join(redact(words))
    say(f"[job {hydra.job.num}] {told} -> {run_dir}{SAID[action]}")
    if action == "skip":
        return objective(run_dir, read_json(run_dir / "summary.json"))
    with disk_errors(path):
        path.unlink(missing_ok=True)  # it describes what is about to change
    if action == "run" and not is_bare(run_dir):
        set_aside(run_dir, folder / "old" / run_dir.name)
        make(run_dir)
    again = [f"resume={run_dir}", *unkept(words)]
    code, stopped = run_child(again if action == "resume" else start)
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
        raise KeyboardInterrupt  # not an Exception: Hydra would go on to the next job
    return objective(run_dir, summary) if code == 0 else math.nan


def decide_job(record: Mapping[str, Any], words: Sequence[str], run_dir: Path) -> Decision:
    """What to do with a job. record: how it ended before, empty if it did not.

    Only a recorded job whose outputs are still those counts as finished: a killed one has no
    record, whatever its folder holds.
    """
    finished = record.get("exit_code") == 0
    now = redact(_by_key(words))
    before = redact(record.get("overrides")) if finished else _started_with(run_dir)
    changes = "" if before == now else "with other overrides"
    return decide(run_dir, changes, record.get("outputs", "") if finished else None)


def _started_with(run_dir: Path) -> dict[str, str] | None:
    """The overrides a job's run was started with; None where its folder does not say."""
    try:
        stored = _by_key(stored_overrides(run_dir))
    except ConfigError:
        return None
    stored.pop("run_dir", None)
    return stored


def _by_key(words: Sequence[str]) -> dict[str, str]:
    return {key_of(word): word.partition("=")[2] for word in words}


def objective(run_dir: Path, summary: Mapping[str, Any]) -> float:
    """What a sweeper optimizes: the best held-out value of a training (train.best_metric),
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
    shown, everything = sweep_table(jobs)
    Console().print(shown)
    write_text(folder / "sweep.csv", everything.csv())
    say(f"numbers of all jobs: {folder / 'sweep.csv'}")
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
