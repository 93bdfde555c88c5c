"""Ways to distribute probability among the alternatives of a symbol, for each sentiment."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpo_cli.grammar.automaton import Alternative


def even(*templates: str) -> list[Alternative]:
    """Equally likely under both sentiments: no evidence."""
    return [(template, 1 / len(templates), 1 / len(templates)) for template in templates]


def tilt(templates: Sequence[str], spread: float) -> list[Alternative]:
    """Log-odds of the sentiment fall evenly from +spread/2 to -spread/2 along the list."""
    step = spread / (len(templates) - 1)
    halves = [(spread / 2 - step * i) / 2 for i in range(len(templates))]
    total = sum(math.exp(half) for half in halves)  # the same for both: halves are symmetric
    return [
        (template, math.exp(half) / total, math.exp(-half) / total)
        for template, half in zip(templates, halves, strict=True)
    ]


def mix(*parts: tuple[float, list[Alternative]]) -> list[Alternative]:
    """Parts in proportion to their weights under both sentiments."""
    total = sum(weight for weight, _ in parts)
    return [(t, p * w / total, n * w / total) for w, part in parts for t, p, n in part]


def lean(
    share: float, positive: list[Alternative], negative: list[Alternative]
) -> list[Alternative]:
    """`positive` with probability `share` under positive sentiment, 1 - share under negative."""
    return [(t, p * share, n * (1 - share)) for t, p, n in positive] + [
        (t, p * (1 - share), n * share) for t, p, n in negative
    ]


def with_article(alternatives: list[Alternative]) -> list[Alternative]:
    """ "superb" -> "a superb", "uneven" -> "an uneven"."""
    return [(f"{'an' if t[0] in 'aeiou' else 'a'} {t}", p, n) for t, p, n in alternatives]
