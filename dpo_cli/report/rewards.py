"""Plots of a reward model's held-out rewards: their separation and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dpo_cli.report.numbers import short_number
from dpo_cli.report.plots import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    headings,
    new_figure,
    plain_axes,
    save_png,
    shorten,
)

BARS = 30
FACTS = tuple[float, float, int]  # of a bin: mean confidence, accuracy, pairs


def draw_rewards(
    run_dir: Path,
    chosen: Sequence[float],
    rejected: Sequence[float],
    bins: Sequence[FACTS],
    error: float,
) -> Path:
    """Draw `plots/held_out_rewards.png`; returns its path. Raises DiskError.

    Left: histograms of the rewards of chosen and rejected responses. Right: how often the
    higher reward was the chosen response's, by the confidence sigmoid(|r_w - r_l|) in that;
    on the dashed line the two agree. A dot's area is its share of the pairs; `error` is the
    expected calibration error.
    """
    width, height = 9.2, 4.2  # inches
    figure = new_figure(width, height)
    caption = f"{len(chosen):,} held-out pairs  ·  {shorten(run_dir.name, 80)}"
    headings(figure, "Held-out rewards", caption, size=13)
    boxes = [(0.65, "Reward"), (5.35, f"Calibration (expected error {error:.1%})")]
    panels = []
    for left, title in boxes:
        axes = figure.add_axes((left / width, 0.7 / height, 3.55 / width, 2.4 / height))
        axes.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
        plain_axes(axes)
        panels.append(axes)
    _histograms(panels[0], chosen, rejected)
    _reliability(panels[1], bins)
    return save_png(figure, run_dir / "plots" / "held_out_rewards.png")


def _histograms(axes: Axes, chosen: Sequence[float], rejected: Sequence[float]) -> None:
    both = np.concatenate([chosen, rejected])
    edges = np.histogram_bin_edges(both, bins=BARS).tolist()
    for values, color in ((chosen, BLUE), (rejected, ORANGE)):
        axes.hist(values, edges, color=color, alpha=0.45)
        axes.hist(values, edges, color=color, histtype="step", linewidth=1.4)
    axes.set_xlabel("reward", fontsize=9, color=GREY)
    axes.set_ylabel("responses", fontsize=9, color=GREY)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the labels
    names = (("chosen", chosen, BLUE), ("rejected", rejected, ORANGE))
    for row, (name, values, color) in enumerate(names):
        axes.annotate(
            f"{name}, mean {short_number(round(float(np.mean(values)), 2))}", (1, 1),
            xytext=(0, -13 * row),
            textcoords="offset points", xycoords="axes fraction", ha="right", va="top",
            fontsize=9, fontweight="bold", color=color,
        )  # fmt: skip


def _reliability(axes: Axes, bins: Sequence[FACTS]) -> None:
    confidence, accuracy, counts = (np.array(column, float) for column in zip(*bins, strict=True))
    axes.plot([0.5, 1], [0.5, 1], color="#999999", linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(confidence, accuracy, color=BLUE, linewidth=1.2, alpha=0.6)
    axes.scatter(
        confidence, accuracy, s=30 + 500 * counts / counts.sum(), color=BLUE,
        edgecolor="white", linewidth=0.9, zorder=4, clip_on=False,
    )  # fmt: skip
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.48, float(accuracy.min()) - 0.05), 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_xlabel("confidence: sigmoid of the difference of rewards", fontsize=9, color=GREY)
    axes.set_ylabel("accuracy", fontsize=9, color=GREY)
