"""Film reviews with an exact ground-truth reward: the embedded dataset.

A review is sampled in two steps: a sentiment (positive or negative, even odds), then one to four
sentences from a probabilistic grammar (`rules.py`) whose choices depend on the sentiment. The
reward of a text is the exact posterior probability of a positive sentiment (`posterior.py`), free
of the errors of a learned scorer.
"""

from __future__ import annotations

import math
from functools import cache

from dpo_cli.grammar.automaton import Node, Uniform, compile_grammar, draw, walk
from dpo_cli.grammar.posterior import Reader
from dpo_cli.grammar.rules import PLAN, RULES

__all__ = ["continue_review", "log_odds", "positive_probability", "sample_review"]


@cache
def _graph() -> list[Node]:
    return compile_grammar(RULES, PLAN)


@cache
def _reader() -> Reader:
    return Reader(_graph(), len(PLAN))


def log_odds(text: str) -> float:
    """log P(positive | text) - log P(negative | text), prior odds even.

    Exact by Bayes' rule for every review of the grammar and every prefix of one, even within a
    word. Of any other text, only what can be parsed counts: a sentence that leaves the grammar
    counts up to there, and parsing resumes with the next sentence. Parsing stops at the end of a
    review, after at most four sentences, so the log-odds is bounded (below 11 in magnitude) and
    repetition gains nothing. Whitespace is collapsed. Never raises on a string.
    """
    return _reader().log_odds(text)


def positive_probability(text: str) -> float:
    """P(positive | text) in (0, 1): the ground-truth reward. See `log_odds`."""
    return 1.0 / (1.0 + math.exp(-log_odds(text)))


def sample_review(rng: Uniform, sentiment: bool | None = None) -> str:
    """A review; `sentiment` True is positive, False negative, None drawn with even odds."""
    positive = rng.random() < 0.5 if sentiment is None else sentiment
    return " ".join(walk(_graph(), 0, positive, rng))


def continue_review(prefix: str, rng: Uniform, sentiment: bool | None = None) -> str:
    """A continuation of a review after the complete words of `prefix`, with its leading space.

    An exact conditional sample: the sentiment (unless given) from its posterior given the prefix,
    the path from the posterior over derivations, the rest from the grammar.
    Empty if the review ends here. Raises ValueError if no review begins with the prefix.
    """
    reader = _reader()
    state, odds = reader.after_sentences[0], 0.0
    for word in prefix.split():
        step = state.steps.get(word) or reader.step(state, word)
        if step is None:
            raise ValueError(f"no review of the grammar begins with {prefix!r}")
        state, odds = step[0], odds + step[1]
    positive = rng.random() < 1.0 / (1.0 + math.exp(-odds)) if sentiment is None else sentiment
    column = 1 if positive else 2
    node = state.beliefs[draw([belief[column] for belief in state.beliefs], rng)][0]
    return "".join(f" {word}" for word in walk(_graph(), node, positive, rng))
