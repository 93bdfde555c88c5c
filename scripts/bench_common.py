"""What `bench_ladder.py`, `bench_profile.py` and `bench_scale.py` share.

Their command line, made of `bench.py`'s words where they mean the same; and the page that a
script keeps: a Markdown file and a picture, one section for each set of conditions, so that
a repeated measurement replaces its own section alone.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_args
from bench_launch import ROOT
from bench_report import INK, KEPT, Record
from bench_run import Results
from bench_summary import circumstances, json_line


def parser(description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_measurement(
    p: argparse.ArgumentParser, steps: int, rounds: int = 3, precision: bool = True
) -> argparse._ArgumentGroup:
    how = p.add_argument_group("measurement")
    how.add_argument("--batch", type=int, default=4, help="pairs a step")
    how.add_argument("--steps", type=int, default=steps, help="timed steps of each process")
    how.add_argument("--warmup", type=int, default=2, help="steps before them, not timed")
    how.add_argument("--rounds", type=int, default=rounds, help="processes of each kind, in turn")
    if precision:
        how.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    how.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    how.add_argument("--lr", type=float, default=1e-4, help="large enough for losses to move")
    how.add_argument("--seed", type=int, default=0, help="of weights and data")
    how.add_argument("--busy-ok", action="store_true", help="measure on a busy machine")
    return how


def add_output(p: argparse.ArgumentParser) -> None:
    out = p.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="end with one line of JSON")
    out.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="FOLDER")
    out.add_argument("--work", metavar="FOLDER", help="where weights and rows lie meanwhile")


def parse(p: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked; with the defaults of `bench.py` for the words that `p` lacks,
    so that they can be handed to its functions."""
    given = p.parse_args(argv)
    others = bench_args.parser(None).parse_args([])
    args = argparse.Namespace(**vars(others) | vars(given))
    bench_args.check(args)
    return args


def facts_of(results: Results, script: str, argv: Sequence[str]) -> Record:
    """As `circumstances`, with this script in the command."""
    facts = circumstances(results, argv)
    return facts | {"command": facts["command"].replace("bench.py", script, 1)}


def where_and_when(record: Record) -> list[str]:
    """The paragraphs that a figure needs to be believed: command, date, code, machine."""
    machine = record["machine"]
    versions = ", ".join(
        f"{k} {record['versions'][k]}" for k in ("python", "torch", "transformers")
    )
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    lines = [f"`{record['command']}`", "",
             f"{record['date']}, commit {record['commit']}, {where}, {machine['system']}; "
             f"{versions}.", ""]  # fmt: skip
    if machine["others_cpu"] > 0.1:
        lines += [f"**Other processes kept up to {machine['others_cpu']:.1f} cores busy.**", ""]
    return lines


def threads_of(record: Record) -> str:
    """`, 2 threads` on a CPU."""
    count = record["settings"]["threads"]
    return f", {count} thread{'' if count == 1 else 's'}" if record["device"] == "cpu" else ""


@dataclass(frozen=True)
class Page:
    """How a script's records become a page.

    about: its first paragraph. heading(record): the conditions that make two measurements
    comparable. section(record): Markdown. draw(figure, record): its part of the picture.
    """

    about: str
    heading: Callable[[Record], str]
    section: Callable[[Record], list[str]]
    draw: Callable[[Any, Record], None]
    size: tuple[float, float]  # inches of a record's part of the picture

    def keep(self, record: Record, folder: Path, name: str) -> Path:
        """Write or update `name` with .md and .png."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.md"
        old = KEPT.findall(path.read_text()) if path.is_file() else []
        records = {self.heading(r): r for r in map(json.loads, old)} | {
            self.heading(record): record
        }
        path.write_text(self.markdown(name, list(records.values())))
        self.picture(path.with_suffix(".png"), list(records.values()))
        return path

    def markdown(self, name: str, records: Sequence[Record]) -> str:
        lines = [f"# {name}", "", f"![{name}]({name}.png)", "", self.about, ""]
        for record in records:
            lines += [f"## {self.heading(record)}", "", *self.section(record)]
            lines += [*where_and_when(record), f"<!-- record: {json_line(record)} -->", ""]
        return "\n".join(lines)

    def picture(self, path: Path, records: Sequence[Record]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        width, height = self.size
        size = (width, height * len(records))
        figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subfigures(len(records), 1, squeeze=False)[:, 0]
        for row, record in zip(rows, records, strict=True):
            where = record["machine"]["gpu"] or record["machine"]["cpu"]
            title = f"{record['preset']}, {self.heading(record)}\n{where}, {record['date']}"
            row.suptitle(title, fontsize=9, x=0.01, ha="left", color=INK)
            self.draw(row, record)
        figure.savefig(path)
