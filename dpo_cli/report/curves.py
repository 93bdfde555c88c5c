"""metrics.jsonl read back as curves, for the plots."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps (n,), values (n,) with NaN gaps


def read_curves(path: Path) -> Curves:
    """Every metric of a JSON-lines file by step; null is NaN, and the last of repeated rows counts.

    A missing file has no curves, and a row that cannot be read (truncated by a crash) is skipped.
    """
    by_name: dict[str, dict[int, float]] = defaultdict(dict)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.split("\n"):
        step, values = _read_row(line)
        for name, value in values.items():
            if value is None or isinstance(value, (int, float)):
                by_name[name][step] = math.nan if value is None else float(value)
    curves = {}
    for name, by_step in by_name.items():
        steps = sorted(by_step)
        curves[name] = (np.array(steps), np.array([by_step[step] for step in steps]))
    return curves


def _read_row(line: str) -> tuple[int, dict[str, float | None]]:
    try:
        row = json.loads(line)
        return int(row.pop("step")), row
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0, {}


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centered window, shorter at the ends; NaN are skipped and stay NaN.

    values: (n,). Returns (n,).
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    n, half = len(values), window // 2
    low = np.maximum(np.arange(n) - half, 0)
    high = np.minimum(np.arange(n) + half + 1, n)
    total, weight = sums[high] - sums[low], counts[high] - counts[low]
    return np.where(finite, total / np.maximum(weight, 1), np.nan)


HEADLINES = (
    "loss",
    "rewards/accuracies",
    "score",
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/score",
)


def training_figures(path: Path) -> dict[str, float]:
    """Figures of a metrics.jsonl: `first/<name>` of the headlines, then the end of every metric.

    The end of a training metric is its mean over the last tenth of the rows (a single step is
    noise), of a held-out one its last value. The first rows are those of the untrained model.
    """
    curves = read_curves(path)
    figures = {f"first/{n}": float(curves[n][1][0]) for n in HEADLINES if n in curves}
    for name, (_, values) in curves.items():
        tail = values[-1:] if name.startswith("eval/") else values[-math.ceil(len(values) / 10) :]
        figures[name] = float(np.nanmean(tail)) if np.isfinite(tail).any() else math.nan
    return figures
