"""Result pages: tables, a Markdown file and a plot.

A page has one section per set of conditions. Each contains its record as JSON in a comment, from
which file and plot are regenerated, so that repeating a measurement replaces only its own section.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.bench.launch import say
from scripts.bench.summary import Record, json_line

KEPT = re.compile(r"^<!-- record: (\{.*\}) -->$", re.MULTILINE)
BLUE, GREY, INK = "#0072B2", "#9A9A9A", "#222222"
MEDIANS = "Medians over the rounds, lowest and highest in brackets."
Rows = list[list[str]]


@dataclass(frozen=True)
class Page:
    """How the records of a command become a page.

    about: its first paragraph. heading(record): the conditions under which measurements are
    comparable. section(record): Markdown. draw(panels, record): fills a `grid` of panels, given
    column by column; without it a page has no plot. height: of a record's part, in inches.
    """

    about: str
    heading: Callable[[Record], str]
    section: Callable[[Record], list[str]]
    draw: Callable[[Any, Record], None] | None = None
    grid: tuple[int, int] = (1, 2)
    height: float = 2.6

    def publish(self, record: Record, args: Any, name: str, tables: Sequence[Rows]) -> int:
        """Print the tables, write the page, and end with the record if --json is set."""
        for rows in tables:
            print("\n".join(table(rows)), end="\n\n")
        print(f"written: {self.keep(record, args.out, name)}")
        if args.json:
            print(json_line(record))
        return 0

    def keep(self, record: Record, folder: Path, name: str) -> Path:
        """Write or update `name`.md and `name`.png."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.md"
        old = KEPT.findall(path.read_text()) if path.is_file() else []
        records = {self.heading(r): r for r in (*map(json.loads, old), record)}
        drawn = self.draw is not None and find_spec("matplotlib") is not None
        path.write_text(self.markdown(name, list(records.values()), drawn))
        if drawn:
            self.picture(path.with_suffix(".png"), list(records.values()))
        return path

    def markdown(self, name: str, records: Sequence[Record], drawn: bool) -> str:
        picture = [f"![{name}]({name}.png)", ""] if drawn else []
        lines = [f"# {name}", "", *picture, self.about, ""]
        for record in records:
            lines += [f"## {self.heading(record)}", "", *self.section(record)]
            lines += [f"<!-- record: {json_line(record)} -->", ""]
        return "\n".join(lines)

    def picture(self, path: Path, records: Sequence[Record]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        assert self.draw is not None
        size = (10.5, self.height * len(records))
        figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(len(records), 1, squeeze=False)[:, 0]
        for part, record in zip(parts, records, strict=True):
            part.suptitle(self.heading(record), fontsize=9, x=0.01, ha="left", color=INK)
            panels = part.subplots(*self.grid, squeeze=False).T.reshape(-1)
            for panel in panels:
                panel.tick_params(labelsize=8)
                panel.spines[["top", "right"]].set_visible(False)
            self.draw(panels, record)
        figure.savefig(path)


def where_and_when(record: Record) -> list[str]:
    """Paragraphs with the provenance of the figures: command, date, code, machine."""
    machine = record["machine"]
    versions = listed(record["versions"])
    for name, others in record.get("other_versions", {}).items():
        versions += f"; {name}: {listed(others)}"
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    lines = [f"`{record['command']}`", "",
             f"{record['date']}, commit {record['commit']}, {where}, {machine['system']}; "
             f"{versions}.", ""]  # fmt: skip
    if machine["others_cpu"] > 0.1:
        lines += [f"**Other processes kept up to {machine['others_cpu']:.1f} cores busy.**", ""]
    return lines


def rounds_line(record: Record, of: str = "side") -> str:
    settings = record["settings"]
    return (f"{settings['rounds']} rounds of {settings['steps']} steps after {settings['warmup']} "
            f"to warm up, every {of} in a separate process.")  # fmt: skip


def threads_of(record: Record) -> str:
    """`, 2 threads` on a CPU."""
    count = record["settings"]["threads"]
    return f", {count} thread{'' if count == 1 else 's'}" if record["device"] == "cpu" else ""


def differ(record: Record, what: str) -> int:
    """Report that processes computed different results, so that nothing is kept. Returns an exit
    code."""
    say(f"ERROR: {what}, nothing was written: {record['losses_agree']}")
    return 1


def listed(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items() if number)


def ranged(value: Mapping[str, float], factor: float = 1.0) -> str:
    middle, low, high = (short(factor * value[key]) for key in ("median", "min", "max"))
    return middle if low == high else f"{middle} [{low}, {high}]"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns, readable on a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def bars(
    axes: Any, values: Mapping[str, Mapping[str, float]], label: str, colors: Sequence[str] | str
) -> None:
    """Bars of the medians; whiskers: lowest and highest."""
    middle = [v["median"] for v in values.values()]
    whiskers = [[v["median"] - v["min"] for v in values.values()],
                [v["max"] - v["median"] for v in values.values()]]  # fmt: skip
    axes.barh(list(values), middle, color=colors, xerr=whiskers, ecolor=INK, capsize=2)
    for place, value in enumerate(values.values()):
        text = f"  {short(value['median'])}"
        axes.text(value["max"], place, text, va="center", fontsize=8, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(v["max"] for v in values.values()))
    axes.set_xlabel(label, fontsize=8, color=INK)
    axes.spines["left"].set_visible(False)
