"""Plot of win rates: one bar per policy and temperature, with its 95% interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from dpo_cli.escapes import printable
from dpo_cli.report.plots import (
    BLUE,
    GREY,
    INK,
    LINE,
    NARROW,
    PHONE,
    headings,
    new_figure,
    plain_axes,
    save_png,
    shorten,
    wrapped,
)

MAX_BARS = 30  # more are in win_rates.json
# Inches: width, and left and right of the bars, for their labels; and of the same for a phone.
SIZES = {"": (7.0, 1.1, 1.6), NARROW: (PHONE, 0.7, 1.65)}
BAR, NAME, EDGE = 0.27, 0.30, 0.2  # inches of a bar, of a policy's name, and before that

Row = Mapping[str, Any]


def draw_win_rates(run_dir: Path, rows: Sequence[Row]) -> Path:
    """Draw `plots/win_rates.png`, and again for phones, of win_rates.json; returns its path.

    The bars of a policy are grouped under its name, one per temperature, in the order of the rows;
    the dashed line is chance. Raises DiskError.
    """
    folder = run_dir / "plots"
    paths = [
        save_png(_picture(run_dir.name, rows, *size), folder / f"win_rates{end}.png")
        for end, size in SIZES.items()
    ]
    return paths[0]


def _picture(name: str, rows: Sequence[Row], width: float, left: float, right: float) -> Figure:
    shown = rows[:MAX_BARS]
    groups: dict[str, list[Row]] = {}
    for row in shown:
        groups.setdefault(str(row["policy"]), []).append(row)
    drawn = BAR * len(shown) + NAME * len(groups)
    heading, letters = wrapped(caption(rows), width), int(10 * width)
    height = drawn + 1.25 + LINE * heading.count("\n")
    figure = new_figure(width, height)
    headings(figure, "Win rate", heading, size=13)
    footer = shorten(name, letters - 20)
    if len(rows) > MAX_BARS:
        footer += f"  ·  {MAX_BARS} of {len(rows)} bars; the others are in win_rates.json"
    footer = wrapped(footer, width)
    figure.text(EDGE / width, 0.1 / height, footer, fontsize=8, color=GREY, parse_math=False)
    axes = figure.add_axes(
        (left / width, 0.55 / height, (width - left - right) / width, drawn / height)
    )
    _style(axes, drawn)
    place = drawn
    for policy, group in groups.items():
        place -= NAME
        axes.text(
            (EDGE - left) / (width - left - right), place + 0.08, _end(policy, letters), fontsize=9,
            fontweight="bold", color=INK, parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
        for row in group:
            place -= BAR
            _bar(axes, row, place + BAR / 2)
    return figure


def caption(rows: Sequence[Row]) -> str:
    """Opponent, judge and number of verdicts."""
    counts = sorted({row["wins"] + row["losses"] + row["ties"] for row in rows})
    number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    parts = [
        f"against {_end(str(rows[0]['opponent']), 20)}", f"judge {_end(str(rows[0]['judge']), 20)}",
        f"{number} verdicts", "95% intervals",
    ]  # fmt: skip
    return "  ·  ".join(parts)


def _end(name: str, characters: int = 70) -> str:
    """A name with its beginning elided to a maximum length: folders differ at their end."""
    name = printable(name)
    return name if len(name) <= characters else f"…{name[1 - characters :]}"


def _style(axes: Axes, top: float) -> None:
    plain_axes(axes, "x")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, top)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MultipleLocator(0.25))
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.axvline(0.5, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=3)


def _bar(axes: Axes, row: Row, place: float) -> None:
    small: dict[str, Any] = {"fontsize": 9, "color": GREY, "va": "center"}
    axes.annotate(
        f"T = {row['temperature']:g}", (0, place), xytext=(-8, 0), textcoords="offset points",
        ha="right", **small,
    )  # fmt: skip
    rate = row["win_rate"]
    if rate is None or math.isnan(rate):
        axes.annotate("no verdicts", (0, place), xytext=(6, 0), textcoords="offset points", **small)
        return
    axes.barh(place, rate, height=0.62 * BAR, color=BLUE, alpha=0.6)
    ends = [row["low"], row["high"]]
    axes.plot(ends, [place] * 2, "|-", color=INK, linewidth=1.2, markersize=6, clip_on=False)
    axes.annotate(
        f"{rate:.0%}  ({row['low']:.0%} to {row['high']:.0%})", (1, place), xytext=(8, 0),
        textcoords="offset points", **small,
    )  # fmt: skip
