"""`dpo-run recipe=... dry_run=true`: the steps to run, their time, and their commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dpo_cli.config.hydra import job_count
from dpo_cli.escapes import printable
from dpo_cli.report import numbers
from dpo_cli.report.table import Column, Table
from dpo_cli.workflow.expand import Folders, Task, expand, resolve
from dpo_cli.workflow.file import Recipe
from dpo_cli.workflow.state import Decision, examine, first_few, jobs_done, record_of
from dpo_cli.workflow.summary import counted, folded


@dataclass(frozen=True)
class Cost:
    """Seconds that a task takes, and seconds left. measured: in an earlier run, else the recipe's
    estimate."""

    seconds: float
    left: float
    measured: bool


@dataclass(frozen=True)
class Planned:
    task: Task
    decision: Decision
    command: str
    jobs: int | None  # None: only Hydra's sweeper knows
    cost: Cost | None


def print_plan(recipe: Recipe, run_dir: Path) -> None:
    """Print the plan; writes no files."""
    rows = plan(recipe, run_dir)
    console = Console()
    _print(console, f"{recipe.name}: {recipe.description}")
    console.print(plan_table(rows))
    _print(console, cost_line([row.cost for row in rows]))
    groups = folded(rows, lambda row: row.task.step.label)
    for group in groups:
        row = next((row for row in group if row.decision.action != "skip"), group[0])
        same = [r.task.slug for r in group if r.decision.action == row.decision.action]
        _print(console, f"\n{row.task.label}: {row.decision.action}{because(row.decision)}")
        _print(console, f"  {row.command}")
        if others := [slug for slug in same if slug != row.task.slug]:
            _print(console, f"  and the same for {row.task.key}={','.join(others)}")
    _print(console, f"\nresults would go to {run_dir}; nothing was written")


def _print(console: Console, line: str) -> None:
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def because(decision: Decision) -> str:
    return f" ({decision.reason})" if decision.reason else ""


def plan(recipe: Recipe, run_dir: Path) -> list[Planned]:
    """One row per task; a task runs again if one that it uses does."""
    rows: list[Planned] = []
    folders: Folders = {}
    rerun: set[str] = set()
    tasks = expand(recipe)
    measured = _measured(tasks, run_dir)
    for task in tasks:
        overrides, uses = resolve(recipe, task, folders)
        if waiting := [title for title in uses if title in rerun]:
            decision = Decision("run", f"after {first_few(waiting)}")
        else:
            _, decision = examine(recipe, task, run_dir, folders)
        folder = task.at(run_dir, folders)
        if decision.action != "skip":
            rerun.add(task.title)
        jobs = job_count(overrides) if task.step.sweep else 1
        command = shlex.join(["dpo-run", *(["-m"] if task.step.sweep else []), *overrides])
        cost = _cost(task, decision, measured, _share_left(decision, folder, jobs))
        rows.append(Planned(task, decision, command, jobs, cost))
    return rows


def _measured(tasks: Sequence[Task], run_dir: Path) -> dict[str, dict[str, float]]:
    """Step -> slug -> seconds that its last finished run in this folder took."""
    times: dict[str, dict[str, float]] = {}
    for task in tasks:
        seconds = record_of(task, run_dir).get("finished_seconds")
        if seconds is not None:
            times.setdefault(task.step.name, {})[task.slug] = float(seconds)
    return times


def _share_left(decision: Decision, folder: Path, jobs: int | None) -> float:
    if decision.action == "skip":
        return 0.0
    if decision.action == "resume" and jobs:
        return max(0.0, 1.0 - jobs_done(folder) / jobs)  # a single run has no jobs done
    return 1.0


def _cost(
    task: Task, decision: Decision, measured: dict[str, dict[str, float]], share_left: float
) -> Cost | None:
    """By this task's earlier time, else the mean of the step's other values, else its `minutes`."""
    times = measured.get(task.step.name, {})
    if times:
        seconds = times.get(task.slug, sum(times.values()) / len(times))
    elif task.step.minutes is not None:
        seconds = 60.0 * task.step.minutes
    else:
        return None
    return Cost(seconds, seconds * share_left, bool(times))


def plan_table(rows: Sequence[Planned]) -> Table:
    """One row per task; if there are many, one row per step."""
    columns = [Column("step"), Column("to do"), Column("jobs", True), Column("minutes", True)]
    lines = []
    for group in folded(rows, lambda row: row.task.step.label):
        task, jobs = group[0].task, [row.jobs for row in group]
        lines.append([
            f"{task.step.label} x{len(group)}" if len(group) > 1 else task.label,
            counted([row.decision.action for row in group]),
            "?" if None in jobs else sum(job or 0 for job in jobs),
            minutes([row.cost for row in group]),
        ])  # fmt: skip
    return Table("Plan", columns, lines)


def minutes(costs: Sequence[Cost | None]) -> str:
    """Their sum: 12.3 if measured, ~12 if a part is an estimate, ? if one is unknown."""
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return "?"
    return _minutes([cost.seconds for cost in known], all(cost.measured for cost in known))


def _minutes(seconds: Sequence[float], measured: bool) -> str:
    return numbers.minutes(sum(seconds)) if measured else f"~{sum(seconds) / 60:.3g}"


def cost_line(costs: Sequence[Cost | None]) -> str:
    known = [cost for cost in costs if cost is not None]
    measured = all(cost.measured for cost in known)
    parts = []
    if known:
        left, total = (
            _minutes(seconds, measured)
            for seconds in ([c.left for c in known], [c.seconds for c in known])
        )
        parts.append(f"time left: {left} of {total} minutes")
    if unknown := len(costs) - len(known):
        parts.append(f"no estimate for {unknown} of {len(costs)} steps")
    if not measured:
        parts.append("~: the recipe's estimate, on two CPU cores")
    return "; ".join(parts)
