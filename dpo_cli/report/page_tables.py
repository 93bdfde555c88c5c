"""Tables and samples of a report, as plain values for its templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.report.page_read import Folder, Row
from dpo_cli.report.page_story import path_name, point_name
from dpo_cli.report.page_text import NOTHING, Text, figure, figures, is_number, label, text

MOST_ROWS = 40
MOST_OPEN = 16  # rows of a table that is not folded away
MOST_ANSWERS = 4  # side by side
MOST_PROMPTS = 10

Column = tuple[str, str, str]  # key, head, metric that says how its numbers look ("" for words)

WIN_RATES: tuple[Column, ...] = (
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


@dataclass(frozen=True)
class Cell:
    text: str
    numeric: bool


@dataclass(frozen=True)
class Table:
    """The first cell of a row is its head. title: of a section of its own."""

    title: str
    caption: str
    heads: list[Cell]
    rows: list[list[Cell]]
    note: str = ""

    @property
    def folded(self) -> bool:
        """Too long to lie open between other things."""
        return len(self.rows) > MOST_OPEN


@dataclass(frozen=True)
class Answer:
    label: str
    completion: Text
    reward: str  # empty where unknown


@dataclass(frozen=True)
class Sample:
    """A prompt and what one or several models made of it."""

    prompt: Text
    answers: list[Answer]


@dataclass(frozen=True)
class Samples:
    """note: which of how many these are; the rows beyond the first `open` are folded away."""

    title: str
    note: str
    rows: list[Sample]
    open: int = 4

    @property
    def listed(self) -> bool:
        """One completion a prompt, no label above it: a list, not columns."""
        return all(len(row.answers) == 1 and not row.answers[0].label for row in self.rows)


def table_of(
    title: str, caption: str, rows: Sequence[Row], columns: Sequence[Column], most: int = MOST_ROWS
) -> Table | None:
    """The columns that some row fills; `x_se` is shown with `x`. None without rows."""
    kept = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    if not rows or not kept:
        return None
    shown = rows[:most]
    heads = [Cell(head, bool(metric)) for _, head, metric in kept]
    filled = [_column(shown, key, metric) for key, _, metric in kept]
    note = f"The first {len(shown)} of {len(rows):,} rows." if len(rows) > len(shown) else ""
    return Table(title, caption, heads, [list(cells) for cells in zip(*filled, strict=True)], note)


def _column(rows: Sequence[Row], key: str, metric: str) -> list[Cell]:
    values = [row.get(key) for row in rows]
    if not metric:
        return [Cell(NOTHING if v is None else text(v, 120).shown, False) for v in values]
    errors = [row.get(f"{key}_se") for row in rows]
    return [Cell(shown, True) for shown in figures(metric, values, errors)]


def win_rates(folder: Folder) -> Table | None:
    rows = [{**row, "policy": path_name(str(row.get("policy", "")))} for row in folder.win_rates]
    caption = "Low and high bound the 95 % interval."
    return table_of("Wins and losses", caption, rows, WIN_RATES)


def sweep(folder: Folder) -> Table | None:
    """sweep.csv: its jobs, settings and first figures."""
    if not folder.sweep:
        return None
    names = [name for name in folder.sweep[0] if name not in ("run_dir", "None")][:8]
    settings = names[: names.index("status")] if "status" in names else []
    columns = []
    for name in names:
        numeric = any(is_number(row.get(name)) for row in folder.sweep)
        kind = "setting" if name in settings else name
        columns.append((name, label(name), kind if numeric else ""))
    return table_of("Sweep", "Jobs, settings and figures", folder.sweep, columns)


def comparison(labels: Sequence[str], summaries: Sequence[Row]) -> Table | None:
    """A row for each figure that some summary has, in the order of first mention."""
    rows = []
    for name in dict.fromkeys(name for summary in summaries for name in summary):
        values = [summary.get(name) for summary in summaries]
        if name.endswith("_se") or not any(map(is_number, values)):
            continue
        errors = [summary.get(f"{name}_se") for summary in summaries]
        cells = [Cell(shown, True) for shown in figures(name, values, errors)]
        rows.append([Cell(label(name), False), *cells])
    heads = [Cell("", False), *(Cell(name, True) for name in labels)]
    return Table("Comparison", "Figures with their standard errors", heads, rows) if rows else None


def facts(caption: str, heads: tuple[str, str], values: Mapping[str, Any]) -> Table | None:
    """Names and values; numbers to four digits, nothing for None."""
    shown = {k: v for k, v in values.items() if v is not None and v != ""}
    numeric = all(map(is_number, shown.values()))
    rows = [[Cell(str(k), False), Cell(_plain(str(k), v), numeric)] for k, v in shown.items()]
    top = [Cell(heads[0], False), Cell(heads[1], numeric)]
    return Table(caption, caption, top, rows) if rows else None


def _plain(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return figure(name, value) if is_number(value) else text(value, 200).shown


def samples_of(folder: Folder) -> Samples | None:
    """Of training, the same prompts before, during and after; of policies, side by side."""
    rows = completions_of(folder)
    steps = sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})
    policies = list(dict.fromkeys(str(row["policy"]) for row in rows if "policy" in row))
    if len(policies) > 1:
        names = {str(row.get("policy")): point_name(row) for row in folder.points}
        chosen = spread(policies, MOST_ANSWERS)
        groups = [
            (names.get(policy) or path_name(policy), first_by_prompt(rows, "policy", policy))
            for policy in chosen
        ]
        return side_by_side("Completions of the same prompts", groups)
    if len(steps) > 1:
        chosen_steps = spread(steps, 3)
        whens = ("Before training", *["During"] * (len(chosen_steps) - 2), "After")
        groups = [
            (f"{when}: step {step:,}", first_by_prompt(rows, "step", step))
            for when, step in zip(whens, chosen_steps, strict=True)
        ]
        return side_by_side("Completions before, during and after", groups)
    return _listed(rows)


def completions_of(folder: Folder) -> list[Row]:
    return [row for row in folder.samples if "prompt" in row and "completion" in row]


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def first_by_prompt(rows: Sequence[Row], key: str = "", value: Any = None) -> dict[str, Row]:
    """prompt -> its first row whose `key` has that value; without a key, of its last step."""
    found: dict[str, Row] = {}
    for row in rows:
        prompt, known = _words(row["prompt"]), found.get(_words(row["prompt"]))
        if key:
            wanted = (str(row.get(key)) == str(value)) and known is None
        else:
            wanted = known is None or _step(row) > _step(known)
        if wanted:
            found[prompt] = row
    return found


def _step(row: Row) -> float:
    step = row.get("step")
    return step if is_number(step) else 0


def _words(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def side_by_side(title: str, groups: Sequence[tuple[str, dict[str, Row]]]) -> Samples | None:
    """Completions of the prompts that all groups share, a column a group."""
    first, *others = (rows for _, rows in groups)
    shared = [prompt for prompt in first if all(prompt in rows for rows in others)]
    rows = [
        Sample(text(prompt), [_answer(name, rows[prompt]) for name, rows in groups])
        for prompt in shared[:MOST_PROMPTS]
    ]
    note = "The first prompts of the rows, not selected."
    if len(shared) > len(rows):
        note = f"The first {len(rows)} of {len(shared):,} prompts, not selected."
    return Samples(title, note, rows) if rows else None


def _listed(rows: Sequence[Row]) -> Samples | None:
    samples = [Sample(text(_words(row["prompt"])), [_answer("", row)]) for row in rows[:MOST_ROWS]]
    note = (
        f"The first {len(samples)} of {len(rows):,}, not selected." if len(rows) > MOST_ROWS else ""
    )
    return Samples("Completions", note, samples, open=8) if samples else None


def _answer(name: str, row: Row) -> Answer:
    reward = row.get("reward")
    return Answer(
        name, text(row["completion"]), figure("reward", reward) if is_number(reward) else ""
    )
