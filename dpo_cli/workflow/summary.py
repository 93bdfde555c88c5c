"""What a recipe prints at the end: its steps, and a comparison of its models."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from dpo_cli.report.console import brief, cell
from dpo_cli.run_folder import read_json

SHOWN_PROMPTS = 3
SHOWN_ROWS = 20  # of more, each step has one row
DONE = {"run": "ran", "resume": "resumed", "skip": "skipped"}

Row = TypeVar("Row")


@dataclass(frozen=True)
class Outcome:
    """How a task ended, as plain values."""

    name: str  # dpo
    step: str  # 02-dpo
    label: str  # 02-dpo-0, the folder's name
    title: str  # dpo (seed=0)
    folder: str
    action: str  # run | resume | skip
    seconds: float  # spent now
    total_seconds: float | None  # spent on what is in the folder, now and earlier


def folded(rows: Sequence[Row], step_of: Callable[[Row], str]) -> list[list[Row]]:
    """The rows one by one, or, of more than SHOWN_ROWS, those of a step together."""
    if len(rows) <= SHOWN_ROWS:
        return [[row] for row in rows]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(step_of(row), []).append(row)
    return list(groups.values())


def counted(words: Sequence[str]) -> str:
    """[run, run, skip] -> "2 run, 1 skip"; a single word as it is."""
    if len(words) == 1:
        return words[0]
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def print_outcomes(rows: Sequence[Outcome]) -> None:
    groups = folded(rows, lambda row: row.step)
    table = Table(title="Steps", title_justify="left")
    for name in ("step", "", "minutes"):
        table.add_column(name, justify="right" if name == "minutes" else "left")
    for group in groups:
        seconds = sum(row.seconds for row in group if row.action != "skip")
        idle = all(row.action == "skip" for row in group)
        table.add_row(
            cell(f"{group[0].step} x{len(group)}" if len(group) > 1 else group[0].label),
            cell(counted([DONE[row.action] for row in group])),
            cell("-" if idle else f"{seconds / 60:.1f}"),
        )
    Console().print(table)


def print_report(rows: Sequence[dict[str, Any]], repeated: str = "") -> None:
    """Figures and completions of some steps side by side.

    rows: {label, folders}, a folder for each value of what the recipe repeats; the completions
    are of the first. repeated: the key of what it repeats.
    """
    if not rows:
        return
    console = Console()
    labels = [row["label"] for row in rows]
    folders = [[Path(folder) for folder in row["folders"]] for row in rows]
    summaries = [[read_json(f / "summary.json") for f in column] for column in folders]
    console.print(figures_table(labels, summaries))
    most = max(map(len, summaries))
    if most > 1:  # a line of its own: a table's title wraps at the table's width
        console.print(f"mean ± standard deviation ({most} {repeated}s)", highlight=False)
    samples = [first_completions(column[0] / "samples.jsonl") for column in folders]
    shared = [prompt for prompt in samples[0] if all(prompt in rows for rows in samples)]
    if shared:
        console.print(samples_table(labels, samples, shared[:SHOWN_PROMPTS]))


def figures_table(labels: Sequence[str], summaries: Sequence[Sequence[dict[str, Any]]]) -> Table:
    """A row for each number that some summary has, in the order of their first mention.

    summaries: of each column, one or several, which are averaged.
    """
    table = Table(title="Comparison", title_justify="left")
    table.add_column("")
    for label in labels:
        table.add_column(cell(label), justify="right")
    names = dict.fromkeys(name for column in summaries for each in column for name in each)
    for name in names:
        columns = [[each.get(name) for each in column] for column in summaries]
        if any(map(_is_number, (value for column in columns for value in column))):
            table.add_row(cell(name), *(cell(averaged(column)) for column in columns))
    return table


def averaged(values: Sequence[Any]) -> Any:
    """A value that all share, or the mean ± standard deviation (n - 1) of the numbers.

    Where only k of n have the number, it is over those k, with (k).
    """
    numbers = [value for value in values if _is_number(value)]
    if all(value == values[0] for value in values):
        return values[0]
    if not numbers:
        return None
    few = f" ({len(numbers)})" if len(numbers) < len(values) else ""
    if len(numbers) == 1:
        return f"{brief(numbers[0])}{few}"
    mean, deviation = statistics.fmean(numbers), statistics.stdev(numbers)
    return f"{brief(mean)} ± {deviation:.2g}{few}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def samples_table(
    labels: Sequence[str], samples: Sequence[dict[str, dict[str, Any]]], prompts: Sequence[str]
) -> Table:
    table = Table(title="Completions", title_justify="left", show_lines=True)
    for name in ("prompt", *labels):
        table.add_column(cell(name), overflow="fold", ratio=1)
    for prompt in prompts:
        table.add_row(cell(prompt), *(cell(_scored(rows[prompt])) for rows in samples))
    return table


def _scored(row: dict[str, Any]) -> str:
    reward = row.get("reward")
    score = f" [reward {reward:.3f}]" if isinstance(reward, (int, float)) else ""
    return f"{row.get('completion', '')}{score}"


def first_completions(path: Path) -> dict[str, dict[str, Any]]:
    """prompt -> its first row of the last step in a samples.jsonl; empty without the file."""
    rows: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            known = rows.get(str(row["prompt"]))
            if known is None or row.get("step", 0) > known.get("step", 0):
                rows[str(row["prompt"])] = row
    return rows
