"""Comparison of a sweep's jobs: for the console, and as a spreadsheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.durable.redact import redact
from dpo_cli.report.table import Column, Table

# Shown first, where the jobs have them; held-out numbers before those of the last train step.
KEY_METRICS = (
    "reward",
    "kl",
    "eval/rewards/accuracies",
    "eval/loss",
    "eval/rewards/margins",
    "rewards/accuracies",
    "loss",
)
_COLUMNS_SHOWN = 5  # of swept keys and metrics, at least two of these: fits 80 characters

_EXIT_NAMES = {
    2: "config error",
    3: "data error",
    4: "not finite",
    5: "no checkpoint",
    6: "locked",
    74: "disk error",
    75: "preempted",
}


def sweep_table(
    jobs: Sequence[Mapping[str, Any]], metrics: Sequence[str] | None = None
) -> tuple[Table, Table]:
    """The jobs for a console, and with all their metrics for `sweep.csv`.

    jobs: mappings with `job`, `overrides` {key: value}, `status` or `exit_code`,
        `summary` {metric: number} and `run_dir`; all but `job` may be missing.
    metrics: shown on the console; by default the first of KEY_METRICS (then of the other
        metrics by name) that any job has, as many as fit.

    Overrides that are the same in every job are left out.
    """
    jobs = redact(jobs)
    keys = _differing_overrides(jobs)
    every = _ordered_metrics(jobs)
    room = max(2, _COLUMNS_SHOWN - len(keys))
    shown = list(metrics) if metrics is not None else every[:room]
    columns = [
        *(Column(name) for name in ("job", *_last_parts(keys), "status")),
        *(Column(name.replace("/", "/\n"), numeric=True) for name in shown),
    ]
    everything = [Column(name) for name in ("job", *keys, "status", *every, "run_dir")]
    rows = [[*_row(job, keys, every), job.get("run_dir")] for job in jobs]
    return (
        Table("Sweep", columns, [_row(job, keys, shown) for job in jobs]),
        Table("Sweep", everything, rows),
    )


def _last_parts(keys: Sequence[str]) -> list[str]:
    """`stage.beta` -> `beta`, unless another key has the same last part."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]


def _row(job: Mapping[str, Any], keys: Sequence[str], metrics: Sequence[str]) -> list[Any]:
    overrides, summary = job.get("overrides") or {}, job.get("summary") or {}
    return [
        job["job"],
        *(overrides.get(key) for key in keys),
        _status(job),
        *(summary.get(metric) for metric in metrics),
    ]


def _differing_overrides(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Override keys whose values differ between jobs, in order of appearance; all of one job."""
    choices = [job.get("overrides") or {} for job in jobs]
    keys = list(dict.fromkeys(key for chosen in choices for key in chosen))
    if len(jobs) < 2:
        return keys
    # repr: 1, 1.0 and True are equal, and lists cannot be hashed
    return [key for key in keys if len({repr(chosen.get(key)) for chosen in choices}) > 1]


def _ordered_metrics(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {name for job in jobs for name in job.get("summary") or {}}
    return [name for name in KEY_METRICS if name in names] + sorted(names.difference(KEY_METRICS))


def _status(job: Mapping[str, Any]) -> str:
    if job.get("status"):
        return str(job["status"])
    code = job.get("exit_code")
    if code is None:
        return "unknown"
    if code == 0:
        return "done"
    if code < 0:
        return f"killed (signal {-code})"
    return f"{_EXIT_NAMES.get(code, 'failed')} (exit {code})"
