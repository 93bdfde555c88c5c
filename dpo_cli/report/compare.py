"""The jobs of a sweep side by side: a table for the terminal, CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from dpo_cli.report.console import cell, printable
from dpo_cli.report.files import redact

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

# A cell that starts with one of these is a formula to Excel, LibreOffice or Google Sheets.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001

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
) -> tuple[Table, str]:
    """A rich table of the jobs, and all their numbers as CSV text.

    jobs: mappings with `job`, `overrides` {key: value}, `status` or `exit_code`,
        `summary` {metric: number} and `run_dir`; all but `job` may be missing.
    metrics: columns of the table; by default the first of KEY_METRICS (then of the other
        metrics by name) that any job has, as many as fit. The CSV has every metric.

    Overrides that are the same in every job are left out. Cells of the CSV that a
    spreadsheet would run as a formula are quoted with an apostrophe.
    """
    jobs = redact(jobs)
    keys = _differing_overrides(jobs)
    every = _ordered_metrics(jobs)
    room = max(2, _COLUMNS_SHOWN - len(keys))
    shown = list(metrics) if metrics is not None else every[:room]
    table = Table(title="Sweep", title_justify="left")
    for name in ("job", *_last_parts(keys), "status"):
        head = printable(name)
        table.add_column(Text(head), overflow="fold", min_width=cell_len(head))
    for name in shown:
        head = printable(name).replace("/", "/\n")  # `eval/`, `rewards/`, `accuracies`
        width = max(map(cell_len, head.split("\n")))
        table.add_column(Text(head), justify="right", min_width=width)
    for job in jobs:
        table.add_row(*(cell(value) for value in _row(job, keys, shown)))
    header = ["job", *keys, "status", *every, "run_dir"]
    rows = [[*_row(job, keys, every), job.get("run_dir")] for job in jobs]
    return table, csv_text([header, *rows])


def _last_parts(keys: Sequence[str]) -> list[str]:
    """`stage.beta` -> `beta`, unless another key ends so, too."""
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
    """Override keys whose values differ, in order of appearance; of a single job, all."""
    choices = [job.get("overrides") or {} for job in jobs]
    keys = list(dict.fromkeys(key for chosen in choices for key in chosen))
    if len(jobs) < 2:
        return keys
    # repr: 1, 1.0 and True are equal, and lists cannot be hashed
    return [key for key in keys if len({repr(chosen.get(key)) for chosen in choices}) > 1]


def _ordered_metrics(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {name for job in jobs for name in job.get("summary") or {}}
    return [name for name in KEY_METRICS if name in found] + sorted(found.difference(KEY_METRICS))


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


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """CSV in which no cell is a formula; nothing for None, NaN and infinities."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_safe(value) for value in row] for row in rows)
    return text.getvalue()


def _safe(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, (int, float)):
        return value
    text = printable(str(value))  # a bare "\r" would also end the row
    return f"'{text}" if text.startswith(_FORMULA_STARTS) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    """Whether the text of an override (`-1e-5`) is a plain number, no formula."""
    try:
        return math.isfinite(float(text)) and text.isascii() and text == text.strip()
    except ValueError:
        return False
