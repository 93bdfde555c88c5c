"""Ground-truth rewards of a text: name -> function of a list of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpo_cli.grammar import positive_probability

Scorer = Callable[[Sequence[str]], list[float]]


def sentiment(texts: Sequence[str]) -> list[float]:
    """p(positive | review) under the embedded grammar, exact, in [0, 1]."""
    return [positive_probability(text) for text in texts]


def length(texts: Sequence[str]) -> list[float]:
    """Number of words: a reward nobody wants, to see length exploitation."""
    return [float(len(text.split())) for text in texts]


SCORERS: dict[str, Scorer] = {"sentiment": sentiment, "length": length}
