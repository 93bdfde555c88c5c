"""Film reviews with an exact ground-truth reward: the embedded dataset.

A review is drawn in two steps: a sentiment (positive or negative, even odds), then one
to four sentences from a probabilistic grammar (`rules.py`) whose choices depend on the
sentiment by degrees. The reward of a text is the posterior probability that its
sentiment was positive, computed exactly (`posterior.py`), so that a policy's reward
carries no error of a learned scorer.
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

    Exact by Bayes' rule for every review of the grammar and for every beginning of one,
    cut anywhere, also inside a word. For all other text it is the evidence of what can be
    read: of a sentence that leaves the grammar, the words up to there count (a slip cannot
    unsay them) and the rest of it does not; reading goes on with the next sentence, and
    stops where a review ends, after four sentences at most. So the log-odds is bounded
    (below 11 either way) and repetition earns nothing beyond a good review. Any white
    space is read as one space. Never raises on a string.
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
    """The rest of a review that begins with the whole words of `prefix`, space included.

    An exact conditional sample: the sentiment from its posterior given the prefix unless
    it is given, the path from the posterior over derivations, the rest from the grammar.
    Empty when the review ends here. Raises ValueError if no review begins so.
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
