"""Statistics of samples: means with errors, calibration, win rates."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # standard normal: P(|z| < Z_95) = 0.95


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, s / sqrt(n); the error of a single value is NaN."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def clustered_mean(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """Mean of all values and its standard error if those of a group depend on each other.

    The cluster-robust error, sqrt(G / (G - 1) sum over groups of (sum of deviations)^2) / n; for
    groups of one it is that of `mean_and_error`. NaN for a single group.
    """
    n = len(values)
    mean = math.fsum(values) / n
    sums: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    if len(sums) < 2:
        return mean, math.nan
    spread = math.fsum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1)
    return mean, math.sqrt(spread) / n


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Share of distinct word n-grams among all (distinct-n, arXiv 1510.03055)."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Bin:
    """A bin of predictions of similar confidence: mean confidence, accuracy and count."""

    confidence: float
    accuracy: float
    count: int


def reliability(margins: Sequence[float], bins: int = 10) -> list[Bin]:
    """Predicted preferences in equal bins of confidence in [1/2, 1]; empty bins are left out.

    margins: r_w - r_l, the log-odds that the chosen response is the better one. The model
    prefers the response with the higher reward, with confidence sigmoid(|margin|), and is
    right if that is the chosen one; a tie is half right.
    """
    groups: list[list[float]] = [[] for _ in range(bins)]
    for margin in margins:
        place = int((_sigmoid(abs(margin)) - 0.5) * 2 * bins)
        groups[min(place, bins - 1)].append(margin)
    return [
        Bin(
            math.fsum(_sigmoid(abs(m)) for m in group) / len(group),
            math.fsum((m > 0) + 0.5 * (m == 0) for m in group) / len(group),
            len(group),
        )
        for group in groups
        if group
    ]


def _sigmoid(value: float) -> float:
    """Sigmoid of a non-negative value, which cannot overflow."""
    return 1.0 / (1.0 + math.exp(-value))


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: mean |accuracy - confidence| over bins, weighted by count
    (arXiv 1706.04599 eq. 3)."""
    total = sum(b.count for b in bins)
    return math.fsum(b.count * abs(b.accuracy - b.confidence) for b in bins) / total


@dataclass(frozen=True)
class WinRate:
    """Share of matches won and its 95% interval; NaN without matches."""

    value: float
    low: float
    high: float


def win_rate(wins: int, losses: int, ties: int) -> WinRate:
    """(wins + ties / 2) / (wins + losses + ties) with Wilson's score interval (1927, 95%).

    A tie counts as half a win in the interval as well. That overestimates its variance, so with
    many ties the interval is too wide rather than too narrow.
    """
    n = wins + losses + ties
    return share_interval((wins + ties / 2) / n if n else math.nan, n)


def share_interval(share: float, n: int) -> WinRate:
    """A share of n with Wilson's score interval; NaN if n is 0."""
    if n == 0:
        return WinRate(math.nan, math.nan, math.nan)
    z2 = Z_95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return WinRate(share, max(0.0, center - half), min(1.0, center + half))
