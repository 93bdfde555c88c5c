"""Summaries of a method's points: its reward up to a KL, its distance to the optimum."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_cli.report.numbers import nats, with_error
from dpo_cli.report.table import Column, Table
from dpo_cli.statistics import mean_and_error

Row = Mapping[str, Any]  # of points.jsonl, with numbers for kl and reward
Curves = Sequence[Sequence[tuple[float, float, float]]]  # per seed: (KL, reward, error), ascending
LADDER = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)  # nats


@dataclass(frozen=True)
class Estimate:
    """se: standard error over seeds, or over prompts if there is one seed; NaN: unknown."""

    reward: float
    se: float


@dataclass(frozen=True)
class Summary:
    """One method. within: KL -> the best reward of its points up to this KL, a mean over seeds.

    shortfall: mean and maximum; at_least: whether they are lower bounds, as some point lies beyond
    the known optimum. samples, gradient_steps: of its longest run.
    """

    name: str
    points: int
    seeds: int
    kl: tuple[float, float]
    within: dict[float, Estimate | None]
    best: Row
    shortfall: tuple[float, float] | None
    at_least: bool
    samples: int | None
    gradient_steps: int | None


def budgets(kls: Sequence[float]) -> list[float]:
    """Three KLs of the 1-2-5 ladder at which to compare methods, the last near the 90th percentile
    of `kls`."""
    largest = float(np.quantile(kls, 0.9, method="lower")) if len(kls) else 1.0
    end = next((i for i, step in enumerate(LADDER) if step >= 0.8 * largest), len(LADDER) - 1)
    return list(LADDER[max(end - 2, 0) : end + 1])


def summarize(name: str, rows: Sequence[Row], kls: Sequence[float]) -> Summary:
    """Summary of a method's rows, at least one, at these KLs."""
    gaps = [float(row["shortfall"]) for row in rows if row.get("shortfall") is not None]
    points = [float(row["kl"]) for row in rows]
    return Summary(
        name=name,
        points=len(rows),
        seeds=len({row.get("seed") for row in rows}),
        kl=(min(points), max(points)),
        within={kl: within(rows, kl) for kl in kls},
        best=max(rows, key=lambda row: float(row["reward"])),
        shortfall=(sum(gaps) / len(gaps), max(gaps)) if gaps else None,
        at_least=any(row.get("beyond_optimum") for row in rows),
        samples=_largest(row.get("samples") for row in rows),
        gradient_steps=_largest(row.get("gradient_steps") for row in rows),
    )


def _largest(values: Iterable[Any]) -> int | None:
    return max((int(v) for v in values if v is not None), default=None)


def within(rows: Sequence[Row], kl: float) -> Estimate | None:
    """The best reward up to this KL, a mean over seeds; None if a seed has no such point.

    The best of several noisy rewards is slightly overestimated, the more the more points there are.
    """
    seeds: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        seeds[row.get("seed")].append(row)
    candidates = [
        [row for row in rows_of_seed if row["kl"] <= kl] for rows_of_seed in seeds.values()
    ]
    if not all(candidates):
        return None
    best = [max(rows_of_seed, key=lambda row: float(row["reward"])) for rows_of_seed in candidates]
    reward, error = mean_and_error([float(row["reward"]) for row in best])
    over_prompts = best[0].get("reward_se")
    if len(best) == 1:
        error = math.nan if over_prompts is None else float(over_prompts)
    return Estimate(reward, error)


@dataclass(frozen=True)
class Lead:
    """The best and second-best method up to a KL, their difference and its standard error."""

    kl: float
    first: str
    second: str
    margin: float
    se: float


def leads(summaries: Sequence[Summary], kls: Sequence[float]) -> list[Lead]:
    """The leading method up to each KL with at least two methods."""
    leading = []
    for kl in kls:
        ranked = sorted(
            ((s.name, estimate) for s in summaries if (estimate := s.within[kl]) is not None),
            key=lambda pair: -pair[1].reward,
        )
        if len(ranked) > 1:
            (first, a), (second, b) = ranked[:2]
            error = math.hypot(a.se, b.se)
            leading.append(Lead(kl, first, second, a.reward - b.reward, error))
    return leading


def mean_curve(curves: Curves, points: int = 200) -> np.ndarray:
    """(4, points): KL, mean reward, low and high of several optima, up to the shortest one's end.

    curves: ascending (KL, reward, standard error), one curve per seed. low and high are the
    extremes over seeds; for one seed, the mean minus and plus its error.
    """
    end = min(curve[-1][0] for curve in curves)
    kl = np.linspace(0.0, math.sqrt(end), points) ** 2  # steep at 0: like sqrt(KL)
    rewards, errors = (
        np.array([
            np.interp(np.sqrt(kl), [math.sqrt(row[0]) for row in curve], [row[i] for row in curve])
            for curve in curves
        ])
        for i in (1, 2)
    )  # fmt: skip
    mean = rewards.mean(0)
    if len(curves) == 1:
        return np.stack([kl, mean, mean - errors[0], mean + errors[0]])
    return np.stack([kl, mean, rewards.min(0), rewards.max(0)])


WITHIN = (
    "Highest reward among a method's points up to a KL: mean over seeds ± its standard error "
    "(one seed: over prompts). The best of many noisy points is slightly overestimated."
)
SHORTFALL = (
    "Shortfall: the optimum's reward at a point's KL minus the point's reward, over its points; ≥ "
    "if the optimum is not known up to that KL. For best-of-n the KL is its upper bound. "
    "Samples and gradient steps: of the longest run."
)


def optimum_at(curves: Curves, kl: float) -> Estimate | None:
    """The optimum's reward at a KL, a mean over seeds; None unless all curves reach it."""
    if not curves or any(curve[-1][0] < kl for curve in curves):
        return None
    known = mean_curve(curves)
    return Estimate(float(np.interp(kl, known[0], known[1])), math.nan)


def rewards_table(summaries: Sequence[Summary], kls: Sequence[float], curves: Curves) -> Table:
    """The highest reward of each method within each KL budget."""
    optimum = [optimum_at(curves, kl) for kl in kls]
    heads = [*(f"KL≤{kl:g}" for kl in kls), "best (at KL)"]
    rows = [["optimum", *map(_shown, optimum), None]] if any(optimum) else []
    rows += [[s.name, *(_shown(s.within[kl]) for kl in kls), _best(s)] for s in summaries]
    return Table("Highest reward up to a KL", _method_and(heads), rows, WITHIN)


def costs_table(summaries: Sequence[Summary]) -> Table:
    """Each method's shortfall of the optimum, and the cost of its runs."""
    heads = ["points", "seeds", "KL", "mean\nshortfall", "largest", "samples", "steps"]
    rows = [
        [s.name, s.points, s.seeds, f"{nats(s.kl[0])}-{nats(s.kl[1])}", *_shortfalls(s),
         s.samples, s.gradient_steps]
        for s in summaries
    ]  # fmt: skip
    return Table("Distance to the optimum, and cost", _method_and(heads), rows, SHORTFALL)


def _method_and(heads: Sequence[str]) -> list[Column]:
    return [Column("method"), *(Column(head, numeric=True) for head in heads)]


def _shown(estimate: Estimate | None) -> str | None:
    return with_error(estimate.reward, estimate.se) if estimate else None


def _best(summary: Summary) -> str:
    return f"{with_error(summary.best['reward'])} ({nats(summary.best['kl'])})"


def _shortfalls(summary: Summary) -> tuple[str | None, str | None]:
    """Mean and largest shortfall, for the table."""
    if summary.shortfall is None:
        return None, None
    mean, largest = summary.shortfall
    return f"{'≥' * summary.at_least}{mean:.3f}", f"{'≥' * summary.at_least}{largest:.3f}"
