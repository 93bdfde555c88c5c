"""Training curves as PNG files, from metrics.jsonl alone; no pyplot, so no global state."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dpo_cli.durable import disk_errors, write_bytes
from dpo_cli.escapes import printable
from dpo_cli.report.curves import Curves, read_curves, running_mean
from dpo_cli.report.numbers import short_number

# Okabe and Ito's palette: distinguishable with any color vision.
BLUE, ORANGE, INK, GREY = "#0072B2", "#D55E00", "#222222", "#6B6B6B"
NARROW = "_narrow"  # suffix of a picture drawn again for phones
ROUNDING = 1e-5  # a relative spread of values below this is rounding noise
SEPARATOR, LINE = "  ·  ", 0.17  # between a caption's parts; inches per line
PHONE = 4.6  # inches: 442 pixels of CSS, a fifth more than a phone's screen has


@dataclass(frozen=True)
class Panel:
    """One chart: its file name, title, and (metric, label, color) per line.

    With one line the held-out rows are drawn in ink; with two, in the color of their line.
    """

    name: str
    title: str
    lines: tuple[tuple[str, str, str], ...]
    reference: float | None = None  # a level to compare with: chance, zero
    percent: bool = False
    from_zero: bool = False
    smooth: bool = True


def _train(metric: str) -> tuple[tuple[str, str, str], ...]:
    return ((metric, "train", BLUE),)


def _pair(prefix: str) -> tuple[tuple[str, str, str], ...]:
    return ((f"{prefix}/chosen", "chosen", BLUE), (f"{prefix}/rejected", "rejected", ORANGE))


PANELS = (
    Panel("loss", "Loss", _train("loss")),
    Panel("objective", "Held-out objective: KL penalty minus score", _train("objective")),
    Panel("score", "Score", _train("score")),
    Panel("kl", "KL to the reference (nats per sequence)", _train("kl"), from_zero=True),
    Panel("kl_coef", "KL coefficient", _train("kl_coef"), from_zero=True, smooth=False),
    Panel("value_loss", "Value loss", _train("value_loss"), from_zero=True),
    Panel("explained_variance", "Explained variance of the critic", _train("explained_variance")),
    Panel(
        "accuracy", "Preference accuracy", _train("rewards/accuracies"), reference=0.5, percent=True
    ),
    Panel("margins", "Reward margin", _train("rewards/margins"), reference=0),
    Panel("rewards", "Rewards", _pair("rewards"), reference=0),
    Panel("calibration", "Expected calibration error", _train("ece"), from_zero=True),
    Panel("logratios", "Log-ratio to the reference (nats)", _pair("logratios"), reference=0),
    Panel("logps", "Log-probability of responses (nats)", _pair("logps")),
    Panel("grad_norm", "Gradient norm", _train("grad_norm"), from_zero=True),
    Panel("lr", "Learning rate", _train("lr"), from_zero=True, smooth=False),
    Panel("throughput", "Throughput (tokens/s)", _train("tokens_per_second"), from_zero=True),
)


def draw_curves(run_dir: Path) -> list[Path]:
    """Draw `metrics.jsonl` into `plots/`: overview.png, again for phones, and each panel.

    Faint lines are the logged values, strong ones their running mean, dots the held-out rows.
    Panels without data are left out; without any data nothing is written. Returns the paths
    written, overview first. Raises DiskError.
    """
    curves = read_curves(run_dir / "metrics.jsonl")
    if "eval/score" in curves and "eval/loss" in curves:  # not the training loss (`label_of`)
        curves["eval/objective"] = curves.pop("eval/loss")
    panels = [panel for panel in PANELS if _has_data(panel, curves)]
    if not panels:
        return []
    folder = run_dir / "plots"
    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 4 else 3
    written = [
        save_png(_overview(panels, curves, run_dir.name, *how), folder / f"overview{end}.png")
        for end, how in (("", (columns, 7.0)), (NARROW, (1, PHONE)))
    ]
    for panel in panels:
        written.append(save_png(_single(panel, curves, run_dir.name), folder / f"{panel.name}.png"))
    return written


def _window(points: int) -> int:
    """A twentieth of the run; 1 (no smoothing) for short runs."""
    return points // 20 if points >= 40 else 1


def _has_data(panel: Panel, curves: Curves) -> bool:
    names = [prefix + metric for metric, _, _ in panel.lines for prefix in ("", "eval/")]
    return any(np.isfinite(curves[name][1]).any() for name in names if name in curves)


def _overview(
    panels: list[Panel], curves: Curves, title: str, columns: int, least: float
) -> Figure:
    """least: inches of its width at least."""
    rows = math.ceil(len(panels) / columns)
    cell_width, cell_height = PHONE, 2.75  # inches
    width = max(columns * cell_width, least)
    caption = wrapped(_caption(panels, curves), width)
    height = rows * cell_height + 0.75 + LINE * caption.count("\n")
    figure = new_figure(width, height)
    headings(figure, shorten(title, int(6 * width)), caption, size=14)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        left, bottom = column * cell_width + 0.65, (rows - 1 - row) * cell_height + 0.5
        axes = figure.add_axes(
            (left / width, bottom / height, (cell_width - 1.5) / width, 1.85 / height)
        )
        _draw(axes, panel, curves)
        axes.set_title(panel.title, loc="left", fontsize=11, color=INK, pad=8)
    return figure


def _single(panel: Panel, curves: Curves, run_name: str) -> Figure:
    width, height = 7.0, 4.2
    figure = new_figure(width, height)
    headings(figure, panel.title, _caption([panel], curves), size=13)
    figure.text(
        0.2 / width, 0.12 / height, shorten(run_name, 70), fontsize=8, color=GREY, parse_math=False
    )
    axes = figure.add_axes(
        (0.75 / width, 0.6 / height, (width - 1.65) / width, (height - 1.4) / height)
    )
    _draw(axes, panel, curves)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty picture, in inches."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def headings(figure: Figure, title: str, caption: str, size: int) -> None:
    """Title and caption, top left."""
    width, height = figure.get_size_inches()
    left = 0.2 / width
    # parse_math=False: a "$" in a run's name does not start a formula
    figure.text(
        left, 1 - 0.15 / height, title, fontsize=size, fontweight="bold", color=INK, va="top",
        parse_math=False,
    )  # fmt: skip
    figure.text(
        left, 1 - 0.45 / height, caption, fontsize=9, color=GREY, va="top", parse_math=False
    )


def wrapped(caption: str, width: float) -> str:
    """A caption wrapped between its parts to a width in inches."""
    lines: list[str] = []
    for part in caption.split(SEPARATOR):
        joined = f"{lines[-1]}{SEPARATOR}{part}" if lines else part
        if lines and len(joined) <= 13.5 * (width - 0.4):
            lines[-1] = joined
        else:
            lines.append(part)
    return "\n".join(lines)


def shorten(name: str, characters: int) -> str:
    """At most so many characters of a name, its end elided; printable."""
    name = printable(name)
    return name if len(name) <= characters else f"{name[: characters - 1]}…"


def _caption(panels: list[Panel], curves: Curves) -> str:
    drawn = [(panel, metric) for panel in panels for metric, _, _ in panel.lines]
    parts = ["x: optimizer step"]
    if any(p.smooth and m in curves and _window(len(curves[m][0])) > 1 for p, m in drawn):
        parts.append("strong line: running mean")
    if any(f"eval/{metric}" in curves for _, metric in drawn):
        parts.append("dots: held-out rows")
    return SEPARATOR.join(parts)


def _draw(axes: Axes, panel: Panel, curves: Curves) -> None:
    pair = len(panel.lines) > 1
    ends: list[tuple[float, str, str]] = []
    for metric, label, color in panel.lines:
        train_end = held_out_end = math.nan
        if metric in curves:
            train_end = _draw_line(axes, *curves[metric], color, panel.smooth)
        if f"eval/{metric}" in curves:
            held_out_end = _draw_dots(axes, *curves[f"eval/{metric}"], color if pair else INK)
        if pair:
            ends.append((train_end if metric in curves else held_out_end, label, color))
        elif math.isfinite(held_out_end):
            ends += [(train_end, label, color), (held_out_end, "held-out", INK)]
    _style(axes, panel)
    _label_ends(axes, ends)


def _draw_line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, smooth: bool
) -> float:
    """Draw a training curve and its running mean; returns the value of its last point."""
    finite = np.isfinite(values)
    window = _window(int(finite.sum())) if smooth else 1
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    means = running_mean(values, window)
    axes.plot(steps, means, color=color, linewidth=1.8, solid_capstyle="round")
    # a point between two gaps is not part of a line
    alone = finite & ~np.append(finite[1:], False) & ~np.insert(finite[:-1], 0, False)
    axes.plot(steps[alone], values[alone], ".", color=color, markersize=6)
    return float(means[finite][-1]) if finite.any() else math.nan


def _draw_dots(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str) -> float:
    """Draw held-out values; returns the last of them."""
    finite = np.isfinite(values)
    axes.plot(
        steps[finite], values[finite], "o", color=color, markersize=5.5,
        markeredgecolor="white", markeredgewidth=0.9, zorder=4,
    )  # fmt: skip
    return float(values[finite][-1]) if finite.any() else math.nan


def plain_axes(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """The common style: a base line, a light grid across `grid`, small gray ticks."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")
    axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=GREY, pad=5)


def _style(axes: Axes, panel: Panel) -> None:
    plain_axes(axes)
    axes.margins(x=0.02, y=0.08)
    low, high = axes.get_ylim()
    if high - low < ROUNDING * max(abs(low), abs(high)):  # constant
        axes.set_ylim(low - 0.1 * abs(low), high + 0.1 * abs(high))
    first, last = axes.get_xlim()
    if last - first < 2:  # a single step
        axes.set_xlim((first + last) / 2 - 1, (first + last) / 2 + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.0%}" if panel.percent else short_number(value))
    )
    if panel.percent:
        axes.set_ylim(-0.03, 1.03)
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.reference is not None:
        axes.axhline(panel.reference, color="#999999", linewidth=1, linestyle=(0, (4, 3)))


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Label the lines at the right edge, with enough space between close labels."""
    ends = sorted((end for end in ends if math.isfinite(end[0])), key=lambda end: end[0])
    bottom, top = axes.get_ylim()
    gap = 12 / (axes.bbox.height / axes.figure.dpi * 72)  # 12 points, as a part of the axes
    places: list[float] = []
    for value, _, _ in ends:
        place = (value - bottom) / (top - bottom)
        places.append(max(place, places[-1] + gap) if places else place)
    for place, (_, label, color) in zip(places, ends, strict=True):
        axes.annotate(
            label, (1, place), xytext=(6, 0), textcoords="offset points",
            xycoords="axes fraction", fontsize=9, fontweight="bold", color=color, va="center",
        )  # fmt: skip


def save_png(figure: Figure, path: Path) -> Path:
    """Write the picture to `path`, whose folder is made if missing. Raises DiskError."""
    with disk_errors(path.parent):
        path.parent.mkdir(exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes(path, image.getvalue())
    return path
