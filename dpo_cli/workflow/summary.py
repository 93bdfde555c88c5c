"""The tables at the end of a recipe: its steps, and a comparison of its models."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from dpo_cli.report.numbers import brief, is_number, minutes
from dpo_cli.report.page_read import read_folder
from dpo_cli.report.page_samples import completions_of, first_by_prompt
from dpo_cli.report.table import Column, Table

SHOWN_PROMPTS = 3
SHOWN_ROWS = 20  # with more, one row per step
DONE = {"run": "ran", "resume": "resumed", "skip": "skipped"}

Row = TypeVar("Row")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task, as plain values."""

    name: str  # dpo
    step: str  # 02-dpo
    label: str  # 02-dpo-0, the folder's name
    title: str  # dpo (seed=0)
    folder: str
    action: str  # run | resume | skip
    seconds: float  # in this invocation
    total_seconds: float | None  # of all starts that produced the folder


def folded(rows: Sequence[Row], step_of: Callable[[Row], str]) -> list[list[Row]]:
    """One group per row, or one per step if there are more than SHOWN_ROWS rows."""
    if len(rows) <= SHOWN_ROWS:
        return [[row] for row in rows]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(step_of(row), []).append(row)
    return list(groups.values())


def counted(words: Sequence[str]) -> str:
    """[run, run, skip] -> "2 run, 1 skip"; [run] -> "run"."""
    if len(words) == 1:
        return words[0]
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def print_outcomes(rows: Sequence[Outcome]) -> None:
    columns = (Column("step"), Column(), Column("minutes", numeric=True))
    lines = []
    for group in folded(rows, lambda row: row.step):
        seconds = sum(row.seconds for row in group if row.action != "skip")
        idle = all(row.action == "skip" for row in group)
        name = f"{group[0].step} x{len(group)}" if len(group) > 1 else group[0].label
        actions = counted([DONE[row.action] for row in group])
        lines.append([name, actions, None if idle else minutes(seconds)])
    Console().print(Table("Steps", columns, lines))


def print_report(rows: Sequence[dict[str, Any]], repeated: str = "") -> None:
    """Print metrics and completions of several steps side by side.

    rows: {label, folders}, one folder per value of the repeated key; the completions are those of
    the first. repeated: that key, "" without repeats.
    """
    if not rows:
        return
    console = Console()
    labels = [row["label"] for row in rows]
    folders = [[read_folder(Path(folder)) for folder in row["folders"]] for row in rows]
    summaries = [[folder.summary for folder in column] for column in folders]
    console.print(figures_table(labels, summaries))
    count = max(map(len, summaries))
    if count > 1:  # a separate line: a table's title wraps at the table's width
        console.print(f"mean ± standard deviation ({count} {repeated}s)", highlight=False)
    samples = [first_by_prompt(completions_of(column[0])) for column in folders]
    shared = [prompt for prompt in samples[0] if all(prompt in rows for rows in samples)]
    if shared:
        table = samples_table(labels, samples, shared[:SHOWN_PROMPTS])
        console.print(table.rich(prose=True))


def figures_table(labels: Sequence[str], summaries: Sequence[Sequence[dict[str, Any]]]) -> Table:
    """One row for each number that occurs in a summary, in order of first occurrence.

    summaries: one or several per column, which are averaged.
    """
    rows = []
    for name in dict.fromkeys(name for column in summaries for each in column for name in each):
        columns = [[each.get(name) for each in column] for column in summaries]
        if any(map(is_number, (value for column in columns for value in column))):
            rows.append([name, *map(averaged, columns)])
    heads = [Column(), *(Column(label, numeric=True) for label in labels)]
    return Table("Comparison", heads, rows)


def averaged(values: Sequence[Any]) -> Any:
    """The value if all are equal, else the mean ± standard deviation (n - 1) of the numbers.

    If only k of n are numbers, these are averaged and (k) is appended.
    """
    numbers = [value for value in values if is_number(value)]
    if all(value == values[0] for value in values):
        return values[0]
    if not numbers:
        return None
    few = f" ({len(numbers)})" if len(numbers) < len(values) else ""
    if len(numbers) == 1:
        return f"{brief(numbers[0])}{few}"
    mean, deviation = statistics.fmean(numbers), statistics.stdev(numbers)
    return f"{brief(mean)} ± {deviation:.2g}{few}"


def samples_table(
    labels: Sequence[str], samples: Sequence[dict[str, dict[str, Any]]], prompts: Sequence[str]
) -> Table:
    rows = [[prompt, *(_scored(rows[prompt]) for rows in samples)] for prompt in prompts]
    return Table("Completions", [*map(Column, ("prompt", *labels))], rows)


def _scored(row: dict[str, Any]) -> str:
    reward = row.get("reward")
    score = f" [reward {reward:.3f}]" if isinstance(reward, (int, float)) else ""
    return f"{row.get('completion', '')}{score}"
