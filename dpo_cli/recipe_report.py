"""What a recipe prints: its plan, what it did, and how its models compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_cli.report.console import cell
from dpo_cli.run_folder import read_json

SHOWN_PROMPTS = 3


def print_plan(title: str, rows: Sequence[tuple[str, str, str]], run_dir: Path) -> None:
    """rows: (step, what would be done, command)."""
    console = Console()
    console.print(title, markup=False, highlight=False)
    for step, action, command in rows:
        console.print(f"\n{step}: {action}", markup=False, highlight=False)
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nresults would go to {run_dir}; nothing was written", markup=False)


def print_outcomes(rows: Sequence[tuple[str, str, float]]) -> None:
    """rows: (step, run | resume | skip, seconds)."""
    done = {"run": "ran", "resume": "resumed", "skip": "skipped"}
    table = Table(title="Steps", title_justify="left")
    for name in ("step", "", "minutes"):
        table.add_column(name, justify="right" if name == "minutes" else "left")
    for step, action, seconds in rows:
        minutes = "-" if action == "skip" else f"{seconds / 60:.1f}"
        table.add_row(cell(step), cell(done[action]), cell(minutes))
    Console().print(table)


def print_report(steps: Sequence[tuple[str, Path]]) -> None:
    """Figures and completions of some steps side by side. steps: (label, folder)."""
    if not steps:
        return
    console = Console()
    labels = [label for label, _ in steps]
    console.print(figures_table(labels, [read_json(f / "summary.json") for _, f in steps]))
    samples = [first_completions(folder / "samples.jsonl") for _, folder in steps]
    shared = [prompt for prompt in samples[0] if all(prompt in rows for rows in samples)]
    if shared:
        console.print(samples_table(labels, samples, shared[:SHOWN_PROMPTS]))


def figures_table(labels: Sequence[str], summaries: Sequence[dict[str, Any]]) -> Table:
    """A row for each number that some summary has, in the order of their first mention."""
    table = Table(title="Comparison", title_justify="left")
    table.add_column("")
    for label in labels:
        table.add_column(cell(label), justify="right")
    for name in dict.fromkeys(name for summary in summaries for name in summary):
        values = [summary.get(name) for summary in summaries]
        if any(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            table.add_row(cell(name), *map(cell, values))
    return table


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
