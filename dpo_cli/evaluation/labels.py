"""Preference pairs from scored completions of one prompt."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """Indices of the preferred and the other completion of a prompt."""

    chosen: int
    rejected: int


def all_pairs(scores: Sequence[float]) -> list[Pair]:
    """All pairs with different scores, the higher one chosen."""
    pairs = []
    for a, b in itertools.combinations(range(len(scores)), 2):
        if scores[a] != scores[b]:
            pairs.append(Pair(a, b) if scores[a] > scores[b] else Pair(b, a))
    return pairs


def net_wins(pairs: Sequence[Pair], count: int) -> list[int]:
    """Comparisons that each of `count` completions wins, minus those that it loses."""
    net = [0] * count
    for pair in pairs:
        net[pair.chosen] += 1
        net[pair.rejected] -= 1
    return net


def best_and_worst(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The pair of the completions with the most and the fewest net wins, which in pairs by score
    are the extremes; none if all have as many."""
    net = net_wins(pairs, count)
    best, worst = net.index(max(net)), net.index(min(net))
    return [Pair(best, worst)] if net[best] > net[worst] else []


def bradley_terry(
    pairs: Sequence[Pair], scores: Sequence[float], temperature: float, rng: random.Random
) -> list[Pair]:
    """Labels drawn with P(a preferred to b) = sigmoid((r_a - r_b) / temperature)."""
    drawn = []
    for pair in pairs:
        gap = (scores[pair.chosen] - scores[pair.rejected]) / temperature
        keep = rng.random() < 1.0 / (1.0 + math.exp(-gap))
        drawn.append(pair if keep else Pair(pair.rejected, pair.chosen))
    return drawn


def flipped(pairs: Sequence[Pair], rate: float, rng: random.Random) -> list[Pair]:
    """Flip each label with probability `rate`."""
    return [Pair(p.rejected, p.chosen) if rng.random() < rate else p for p in pairs]
