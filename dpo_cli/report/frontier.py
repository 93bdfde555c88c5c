"""Plot of reward against KL to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dpo_cli.escapes import printable
from dpo_cli.report.numbers import count, short_number
from dpo_cli.report.plots import (
    BLUE,
    GREY,
    INK,
    LINE,
    NARROW,
    ORANGE,
    PHONE,
    SEPARATOR,
    headings,
    new_figure,
    plain_axes,
    save_png,
    shorten,
    wrapped,
)

# Okabe and Ito's palette without its yellow: (color, marker, size).
STYLES = {
    "dpo": (BLUE, "o", 7.0),
    "online-dpo": ("#56B4E9", "P", 8.0),
    "ppo-baseline": (ORANGE, "s", 6.5),
    "ppo": (ORANGE, "s", 6.5),
    "ppo-gt": ("#E69F00", "v", 7.5),
    "unlikelihood": ("#009E73", "^", 7.5),
    "sft": ("#CC79A7", "X", 8.0),
    "preferred-ft": ("#CC79A7", "X", 8.0),
}
MORE_STYLES = (
    ("#E69F00", "v", 7.5), ("#56B4E9", "P", 8.0), ("#CC79A7", "X", 8.0), ("#009E73", "^", 7.5),
    ("#8C564B", "d", 7.5), (GREY, "p", 8.0), (BLUE, "*", 9.5), (ORANGE, "h", 8.0),
)  # fmt: skip


NARROWEST = 0.1  # nats: the axis is at least this wide


@dataclass(frozen=True)
class Cloud:
    """The points of one method, all (n,). last: at the end of its run, not a checkpoint."""

    name: str
    kl: np.ndarray
    kl_se: np.ndarray
    reward: np.ndarray
    reward_se: np.ndarray
    last: np.ndarray
    labels: tuple[str, ...] = ()  # beside the points; none: unlabelled


@dataclass(frozen=True)
class Band:
    """The optimum, all (n,): its mean over seeds; low, high: the extremes over seeds, or for a
    single seed the mean minus and plus its standard error."""

    kl: np.ndarray
    reward: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def draw_frontier(
    run_dir: Path, methods: Sequence[Cloud], best_of: Cloud | None, optimum: Band | None
) -> Path:
    """Draw `plots/frontier.png`, and again for phones; returns its path. Raises DiskError.

    One color and shape per method, error bars of one standard error; best-of-n is hollow, at the
    bound of its KL. A few points far to the right are only counted in the caption.
    """
    folder = run_dir / "plots"
    paths = [
        save_png(
            _picture(run_dir.name, methods, best_of, optimum, narrow=bool(end)),
            folder / f"frontier{end}.png",
        )
        for end in ("", NARROW)
    ]
    return paths[0]


def _picture(
    name: str, methods: Sequence[Cloud], best_of: Cloud | None, optimum: Band | None, narrow: bool
) -> Figure:
    """The legend is to the right of the axes; in a narrow picture, below them."""
    clouds = [*methods, *([best_of] if best_of else [])]
    limit = kl_limit([cloud.kl for cloud in clouds])
    if not clouds and optimum:
        limit = max(float(optimum.kl[-1]), NARROWEST)
    rows = 0.27 * (len(clouds) + bool(optimum) + bool(best_of)) + 0.2
    width = PHONE if narrow else 9.2  # inches, as below
    caption = wrapped(_caption(clouds, optimum, limit), width)
    top = 0.95 + LINE * caption.count("\n")
    below, right = (0.8 + rows, 0.3) if narrow else (0.8, 2.45)
    height = below + 3.65 + top
    figure = new_figure(width, height)
    title = "Reward against KL to the reference"
    headings(figure, title, caption, size=13)
    figure.text(
        0.2 / width, 0.12 / height, shorten(name, int(10 * width)), fontsize=8, color=GREY,
        parse_math=False,
    )  # fmt: skip
    axes = figure.add_axes(
        (0.8 / width, below / height, (width - 0.8 - right) / width, 3.65 / height)
    )
    _style(axes)
    _draw_optimum(axes, optimum)
    for cloud, style in zip(methods, styles([c.name for c in methods]), strict=True):
        _draw_cloud(axes, cloud, *style)
    if best_of:
        _draw_best_of(axes, best_of, limit)
    axes.set_xlim(-0.025 * limit, 1.05 * limit)
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(-0.02, -0.12) if narrow else (1.02, 1.02), frameon=False,
        fontsize=9, labelcolor=INK, labelspacing=0.9, handlelength=1.6,
    )  # fmt: skip
    for text in legend.get_texts():  # a "$" in a method's name is no formula
        text.set_parse_math(False)
    return figure


def kl_limit(methods: Sequence[np.ndarray]) -> float:
    """The largest KL drawn, of the KLs of each method, (n,).

    Points beyond three times the upper quartile are left out, except a method's first point where
    the other points stay readable beside it.
    """
    kls = np.concatenate([*methods, np.zeros(0)])
    if not len(kls):
        return 1.0
    most = 3.0 * float(np.quantile(kls, 0.75))
    limit = max(float(kls[kls <= most].max()) or float(kls.max()), NARROWEST)
    firsts = [float(own.min()) for own in methods if len(own)]
    return max([limit, *(first for first in firsts if first <= 4.0 * limit)])


def styles(names: Sequence[str]) -> list[tuple[str, str, float]]:
    """(color, marker, size) of each method; the known ones always have the same."""
    taken = [STYLES[name] for name in names if name in STYLES]
    free = [style for style in MORE_STYLES if style not in taken]
    others = [name for name in names if name not in STYLES]
    given = {name: free[i % len(free)] for i, name in enumerate(others)}
    return [STYLES.get(name) or given[name] for name in names]


def _caption(clouds: Sequence[Cloud], optimum: Band | None, limit: float) -> str:
    parts = ["bars: one standard error over prompts"]
    if any(not cloud.last.all() for cloud in clouds):
        parts.append("small: checkpoints")
    if optimum:
        seeds = optimum.seeds
        parts.append(f"band: {seeds} seeds" if seeds > 1 else "band: one standard error")
    beyond = [float(kl) for cloud in clouds for kl in cloud.kl if kl > 1.05 * limit]
    if beyond:
        unseen = [cloud.name for cloud in clouds if (cloud.kl > 1.05 * limit).all()]
        methods = f" (all of {shorten(', '.join(unseen), 14)})" if unseen else ""
        most = short_number(round(max(beyond), 1))
        parts.append(f"{count(len(beyond), 'point')} to the right{methods}, up to a KL of {most}")
    return SEPARATOR.join(parts)


def _style(axes: Axes) -> None:
    plain_axes(axes)
    axes.margins(x=0.02, y=0.08)
    axes.set_xlabel("KL(policy || reference) per completion, nats", fontsize=9, color=GREY)
    axes.set_ylabel("reward", fontsize=9, color=GREY)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _draw_optimum(axes: Axes, optimum: Band | None) -> None:
    if optimum is None:
        return
    axes.fill_between(optimum.kl, optimum.low, optimum.high, color=INK, alpha=0.18, linewidth=0)
    axes.plot(optimum.kl, optimum.reward, color=INK, linewidth=1.6, label="optimum", zorder=3)


def _draw_cloud(axes: Axes, cloud: Cloud, color: str, marker: str, size: float) -> None:
    axes.errorbar(
        cloud.kl, cloud.reward, cloud.reward_se, cloud.kl_se, fmt="none", ecolor=color,
        elinewidth=1, alpha=0.45, zorder=4,
    )  # fmt: skip
    for last, scale in ((False, 0.55), (True, 1.0)):
        at = cloud.last == last
        axes.plot(
            cloud.kl[at], cloud.reward[at], marker, color=color, markersize=size * scale,
            alpha=1.0 if last else 0.55, markeredgecolor="white",
            markeredgewidth=0.8 if last else 0.3, zorder=6 if last else 5,
            label=printable(cloud.name) if last else None,
        )  # fmt: skip


def _draw_best_of(axes: Axes, cloud: Cloud, limit: float) -> None:
    axes.plot(
        cloud.kl, cloud.reward, "D", markersize=6, markerfacecolor="white", markeredgecolor=INK,
        markeredgewidth=1.2, zorder=7, label="best-of-n, its n beside\nit, at the bound of its KL",
    )  # fmt: skip
    for kl, reward, label in zip(cloud.kl, cloud.reward, cloud.labels, strict=True):
        if kl <= 1.05 * limit:
            # No policy can be above and to the left: that would be beyond the optimum.
            offset, side = ((-7, 5), "right") if kl > 0 else ((8, -3), "left")
            axes.annotate(
                label, (kl, reward), xytext=offset, textcoords="offset points", fontsize=8,
                color=INK, ha=side, zorder=8,
            )  # fmt: skip
