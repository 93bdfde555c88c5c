"""The tables of a report: results of several runs, policies or jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.report.numbers import NOTHING, figure, figures, is_number, label, label_of
from dpo_cli.report.page_read import Folder, Row
from dpo_cli.report.page_samples import text
from dpo_cli.report.page_story import BASELINES, path_name
from dpo_cli.report.table import Column, Measured, Table

MAX_ROWS, MAX_POINTS = 40, 300

Shown = tuple[str, str, str]  # key of the rows, head, metric of its numbers ("": texts)

WIN_RATES: tuple[Shown, ...] = (
    ("policy", "Policy", ""),
    ("opponent", "Opponent", ""),
    ("temperature", "Temperature", "temperature"),
    ("win_rate", "Win rate", "win_rate"),
    ("low", "Low", "low"),
    ("high", "High", "high"),
    ("wins", "Wins", "wins"),
    ("losses", "Losses", "losses"),
    ("ties", "Ties", "ties"),
    ("errors", "Errors", "errors"),
    ("unasked", "Not asked", "unasked"),
    ("judge", "Judge", ""),
)
POINTS: tuple[Shown, ...] = (
    ("method", "Method", ""),
    ("setting", "Setting", ""),
    ("kl", "KL (nats)", "kl"),
    ("reward", "Reward", "reward"),
    ("optimum_reward_at_kl", "Optimum at that KL", "reward"),
    ("shortfall", "Gap to it", "reward"),
    ("step", "Step", "step"),
    ("seed", "Seed", "seed"),
    ("gradient_steps", "Gradient steps", "gradient_steps"),
    ("samples", "Samples", "samples"),
)


def table_of(
    title: str, caption: str, rows: Sequence[Row], columns: Sequence[Shown], most: int = MAX_ROWS
) -> Table | None:
    """The columns that some row fills; `x_se` is shown with `x`. None without rows."""
    filled = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    if not rows or not filled:
        return None
    heads = [Column(head, bool(metric), metric) for _, head, metric in filled]
    cells = [[_cell(row, key, metric) for key, _, metric in filled] for row in rows[:most]]
    note = f"The first {most} of {len(rows):,} rows." if len(rows) > most else ""
    return Table(title, heads, cells, caption, note)


def _cell(row: Row, key: str, metric: str) -> Any:
    value = row.get(key)
    if metric:
        return Measured(value, row.get(f"{key}_se"))
    return NOTHING if value is None else text(value, 120).shown


def win_rates(folder: Folder) -> Table | None:
    rows = [{**row, "policy": path_name(str(row.get("policy", "")))} for row in folder.win_rates]
    caption = "Low and high bound the 95 % interval."
    return table_of("Wins and losses", caption, rows, WIN_RATES)


def points(folder: Folder) -> Table | None:
    """Trained policies first, then the optimum and best-of-n; by rising KL within each method."""

    def place(row: Row) -> tuple[bool, str, float]:
        kl = row.get("kl")
        return (row.get("method") in BASELINES, str(row.get("method")), kl if is_number(kl) else 0)

    rows = sorted(folder.points, key=place)
    caption = "Reward and KL with their standard errors"
    return table_of("Policies", caption, rows, POINTS, MAX_POINTS)


def sweep(folder: Folder) -> Table | None:
    """sweep.csv: its jobs, settings and first figures."""
    if not folder.sweep:
        return None
    names = [name for name in folder.sweep[0] if name not in ("run_dir", "None")][:8]
    settings = names[: names.index("status")] if "status" in names else []
    columns = []
    for name in names:
        numeric = any(is_number(row.get(name)) for row in folder.sweep)
        metric = "setting" if name in settings else name
        columns.append((name, label(name), metric if numeric else ""))
    return table_of("Sweep", "Jobs, settings and figures", folder.sweep, columns)


def comparison(labels: Sequence[str], summaries: Sequence[Row]) -> Table | None:
    """A row for each figure that some summary has, in the order of first mention."""
    rows = []
    for name in dict.fromkeys(name for summary in summaries for name in summary):
        values = [summary.get(name) for summary in summaries]
        if name.endswith("_se") or not any(map(is_number, values)):
            continue
        errors = [summary.get(f"{name}_se") for summary in summaries]
        owner = next(summary for summary in summaries if name in summary)
        rows.append([label_of(name, owner), *figures(name, values, errors)])
    columns = [Column(), *(Column(name, numeric=True) for name in labels)]
    return (
        Table("Comparison", columns, rows, "Figures with their standard errors") if rows else None
    )


def facts(caption: str, heads: tuple[str, str], values: Mapping[str, Any]) -> Table | None:
    """Names and values, without those that are unknown."""
    known = {k: v for k, v in values.items() if v is not None and v != ""}
    columns = [Column(heads[0]), Column(heads[1], numeric=all(map(is_number, known.values())))]
    rows = [[str(name), _fact(str(name), value)] for name, value in known.items()]
    return Table(caption, columns, rows, caption) if rows else None


def _fact(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return figure(name, value) if is_number(value) else text(value, 200).shown
