"""What a report says of several policies: their points, and the tables of frontier.md."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dpo_cli.report.page_read import Folder, Row
from dpo_cli.report.page_story import BASELINES
from dpo_cli.report.page_tables import Cell, Column, Table, table_of
from dpo_cli.report.page_text import is_number

POINTS: tuple[Column, ...] = (
    ("method", "Method", ""),
    ("setting", "Setting", ""),
    ("kl", "KL (nats)", "kl"),
    ("reward", "Reward", "reward"),
    ("optimum_reward_at_kl", "Optimum at that KL", "reward"),
    ("shortfall", "Short of it by", "reward"),
    ("step", "Step", "step"),
    ("seed", "Seed", "seed"),
    ("gradient_steps", "Gradient steps", "gradient_steps"),
    ("samples", "Samples", "samples"),
)
TITLES = ("Highest reward up to a KL", "Distance to the optimum, and cost")
MOST_POINTS = 300


def points(folder: Folder) -> Table | None:
    """Trained policies first, then the optimum and best-of-N; by rising KL in each method."""

    def place(row: Row) -> tuple[bool, str, float]:
        kl = row.get("kl")
        return (row.get("method") in BASELINES, str(row.get("method")), kl if is_number(kl) else 0)

    rows = sorted(folder.points, key=place)
    caption = "Reward and KL with their standard errors"
    return table_of("Policies", caption, rows, POINTS, MOST_POINTS)


def frontier_tables(folder: Folder) -> list[Table]:
    """The tables of frontier.md, each under the paragraph before it."""
    found: list[Table] = []
    paragraph = ""
    for block in folder.frontier.split("\n\n"):
        lines = block.strip().split("\n")
        if lines[0].startswith("| ") and len(lines) > 2:
            title = TITLES[min(len(found), len(TITLES) - 1)]
            found.append(_table(title, paragraph, lines))
        elif lines[0][:1] not in "#-":
            paragraph = " ".join(lines)
    return found


def _table(title: str, caption: str, lines: Sequence[str]) -> Table:
    head, rule, *rows = ([c.strip() for c in re.split(r"(?<!\\)\|", x)[1:-1]] for x in lines)
    numeric = [mark.endswith(":") for mark in rule]

    def cells(values: Sequence[str]) -> list[Cell]:
        pairs = zip(values, numeric, strict=False)
        return [Cell(value.replace(r"\|", "|"), right) for value, right in pairs]

    return Table(title, caption, cells(head), [cells(row) for row in rows])
