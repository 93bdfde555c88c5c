"""A grammar compiled to a probabilistic automaton over words.

The grammar has no recursion, so its reviews are the paths of a finite graph. An edge
carries a word and the probability of taking it under either sentiment; the probability
of a review is the product along its path, summed over paths that spell the same words.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

# (template, P(template | positive), P(template | negative)). A template is words and
# {symbols} between single spaces; a suffix may touch a symbol: "{director}'s", "{clause}."
Alternative = tuple[str, float, float]
Rules = Mapping[str, Sequence[Alternative]]
# Row i lists what may follow i sentences: (symbol, next row, probability). The symbol ""
# ends the review; so does the last row, which is empty.
Plan = Sequence[Sequence[tuple[str, int, float]]]


class Uniform(Protocol):
    """What sampling needs of `random.Random` or `numpy.random.Generator`."""

    def random(self) -> float: ...


@dataclass(slots=True)
class Node:
    """Outgoing edges of a node: words[i] leads to node targets[i]; the word "" ends the review.

    positive[i], negative[i]: probability of edge i under each sentiment.
    """

    words: list[str] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    positive: list[float] = field(default_factory=list)
    negative: list[float] = field(default_factory=list)


def compile_grammar(rules: Rules, plan: Plan) -> list[Node]:
    """The graph of all reviews; node i < len(plan) is the state after i sentences."""
    for symbol, alternatives in rules.items():
        positive = sum(alternative[1] for alternative in alternatives)
        negative = sum(alternative[2] for alternative in alternatives)
        assert math.isclose(positive, 1.0), symbol
        assert math.isclose(negative, 1.0), symbol
    graph = [Node() for _ in plan]
    for row, followers in enumerate(plan):
        for symbol, next_row, probability in followers:
            item = f"{{{symbol}}}" if symbol else ""
            _expand(graph, rules, item, row, next_row, (probability, probability), capital=True)
    return graph


def _expand(
    graph: list[Node],
    rules: Rules,
    item: str,
    source: int,
    target: int,
    scale: tuple[float, float],
    capital: bool,
) -> None:
    """Add the paths from source to target that spell `item`: a word, or `{symbol}` + suffix.

    scale: factor on the first edge of every path; capital: capitalize its first letter.
    """
    if not item.startswith("{"):
        node = graph[source]
        node.words.append(item[:1].upper() + item[1:] if capital else item)
        node.targets.append(target)
        node.positive.append(scale[0])
        node.negative.append(scale[1])
        return
    symbol, _, suffix = item[1:].partition("}")
    for template, positive, negative in rules[symbol]:
        items = (template + suffix).split(" ")
        stops = [source, *range(len(graph), len(graph) + len(items) - 1), target]
        graph.extend(Node() for _ in items[1:])
        first = (scale[0] * positive, scale[1] * negative)
        _expand(graph, rules, items[0], stops[0], stops[1], first, capital)
        for i in range(1, len(items)):
            _expand(graph, rules, items[i], stops[i], stops[i + 1], (1.0, 1.0), capital=False)


def walk(graph: list[Node], node: int, positive: bool, rng: Uniform) -> list[str]:
    """The words of a random path from `node` to the end of the review."""
    words = []
    while graph[node].words:
        here = graph[node]
        i = draw(here.positive if positive else here.negative, rng)
        if not here.words[i]:
            break
        words.append(here.words[i])
        node = here.targets[i]
    return words


def draw(weights: Sequence[float], rng: Uniform) -> int:
    """An index with probability in proportion to its weight."""
    cumulative = list(accumulate(weights))
    # The last index takes the rest: rounding may carry the draw up to the total itself.
    return bisect(cumulative, rng.random() * cumulative[-1], 0, len(cumulative) - 1)
