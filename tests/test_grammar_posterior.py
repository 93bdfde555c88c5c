"""The exact posterior: against enumeration, recursive descent and hand-worked numbers."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.grammar import automaton, log_odds, positive_probability, rules, sample_review
from dpo_cli.grammar.posterior import Reader, State

Pair = tuple[float, float]  # probability under positive, under negative sentiment

# Ambiguous on purpose: "The plot was dull." has three derivations, words are shared
# between kinds of sentences, and a symbol carries a suffix.
TOY_RULES = {
    "first": [("{thing} was {poor}.", 0.5, 0.2), ("{thing} was {any}.", 0.3, 0.5),
              ("the {noun} was dull.", 0.2, 0.3)],
    "second": [("it was {poor} but {thing} was {any}.", 0.6, 0.3),
               ("{thing} was {poor}!", 0.4, 0.7)],
    "thing": [("the {noun}", 0.7, 0.4), ("the plot", 0.3, 0.6)],
    "noun": [("plot", 0.5, 0.5), ("cast", 0.5, 0.5)],
    "poor": [("dull", 0.9, 0.5), ("du", 0.1, 0.5)],
    "any": [("dull", 0.2, 0.8), ("superb", 0.8, 0.2)],
}  # fmt: skip
TOY_PLAN = ((("first", 1, 1.0),), (("second", 2, 0.6), ("", 2, 0.4)), ())


def expand(symbol: str) -> dict[str, Pair]:
    """Every text of a toy symbol with its probabilities: all derivations, by substitution."""
    texts: Counter[tuple[str, int]] = Counter()
    for template, positive, negative in TOY_RULES[symbol]:
        partial = {"": (positive, negative)}
        for piece in re.split(r"(\{\w+\})", template):
            options = expand(piece[1:-1]) if piece.startswith("{") else {piece: (1.0, 1.0)}
            partial = {
                left + right: (p * q[0], n * q[1])
                for left, (p, n) in partial.items()
                for right, q in options.items()
            }
        for text, (p, n) in partial.items():
            texts[text, 0] += p
            texts[text, 1] += n
    return {text: (texts[text, 0], texts[text, 1]) for text, _ in texts}


@cache
def toy_reviews() -> dict[str, Pair]:
    reviews = {}
    for first, (p, n) in expand("first").items():
        one = first.capitalize()
        reviews[one] = (0.4 * p, 0.4 * n)
        for second, (q, m) in expand("second").items():
            reviews[f"{one} {second.capitalize()}"] = (0.6 * p * q, 0.6 * n * m)
    return reviews


def test_toy_posterior_equals_enumeration_for_every_text_and_every_beginning() -> None:
    reviews = toy_reviews()
    assert sum(p for p, _ in reviews.values()) == pytest.approx(1.0)
    reader = Reader(automaton.compile_grammar(TOY_RULES, TOY_PLAN), len(TOY_PLAN))
    for text, (p, n) in reviews.items():
        assert reader.log_odds(text) == pytest.approx(math.log(p / n), abs=1e-9)
        for end in range(len(text)):
            beginning = text[:end]
            same = [pair for other, pair in reviews.items() if other.startswith(beginning)]
            expected = math.log(sum(p for p, _ in same) / sum(n for _, n in same))
            assert reader.log_odds(beginning) == pytest.approx(expected, abs=1e-9), beginning


def add(ends: dict[int, Pair], end: int, p: float, n: float) -> None:
    old = ends.get(end, (0.0, 0.0))
    ends[end] = (old[0] + p, old[1] + n)


@cache
def symbol_ends(text: str, symbol: str, start: int, capital: bool) -> dict[int, Pair]:
    """Where `symbol` may end if it starts here, with P(symbol spells text[start:end])."""
    ends: dict[int, Pair] = {}
    for template, positive, negative in rules.RULES[symbol]:
        for end, (p, n) in template_ends(text, template, start, capital).items():
            add(ends, end, positive * p, negative * n)
    return ends


@cache
def template_ends(text: str, template: str, start: int, capital: bool) -> dict[int, Pair]:
    if not template:
        return {start: (1.0, 1.0)}
    head, rest = re.match(r"(\{\w+\}|[^{]+)(.*)", template).groups()  # type: ignore[union-attr]
    if head.startswith("{"):
        heads = symbol_ends(text, head[1:-1], start, capital)
    else:
        literal = head[0].upper() + head[1:] if capital else head
        heads = {start + len(head): (1.0, 1.0)} if text.startswith(literal, start) else {}
    ends: dict[int, Pair] = {}
    for middle, (p, n) in heads.items():
        for end, (q, m) in template_ends(text, rest, middle, False).items():
            add(ends, end, p * q, n * m)
    return ends


def inside(text: str, row: int = 0, start: int = 0) -> Pair:
    """P(text | sentiment) under the real rules, by recursive descent over characters."""
    ended = start > len(text)
    positive = negative = float(ended and not rules.PLAN[row])
    for symbol, next_row, share in rules.PLAN[row]:
        if not symbol:
            positive, negative = positive + share * ended, negative + share * ended
            continue
        for end, (p, n) in symbol_ends(text, symbol, start, True).items():
            if end == len(text) or text[end] == " ":
                q, m = inside(text, next_row, end + 1)
                positive, negative = positive + share * p * q, negative + share * n * m
    return positive, negative


def test_posterior_equals_bayes_rule_by_recursive_descent() -> None:
    rng = random.Random(1)
    for _ in range(60):
        text = sample_review(rng)
        positive, negative = inside(text)
        assert positive > 0
        assert log_odds(text) == pytest.approx(math.log(positive / negative), abs=1e-9)
        assert positive_probability(text) == pytest.approx(positive / (positive + negative))


def test_hand_worked_posteriors() -> None:
    right = "The critics called the film superb, and they were right."
    wrong = "The critics called the film superb, but they were wrong."
    assert positive_probability(right) == pytest.approx(0.8)
    assert positive_probability(wrong) == pytest.approx(0.2)
    assert log_odds(f"{wrong} It is set in Paris.") == pytest.approx(math.log(0.25))
    # Four stars: 0.37 against 0.10, independent of the first sentence.
    assert log_odds(f"{wrong} I give it four stars out of five.") == pytest.approx(
        math.log(0.25 * 3.7)
    )
    assert log_odds("") == 0.0


def test_context_turns_a_word_round() -> None:
    assert positive_probability("As a comedy, the film was dull.") < 0.4
    assert positive_probability("As a comedy, the film was never dull.") > 0.6
    assert positive_probability("As a comedy, the film was anything but superb.") < 0.4


def test_no_word_decides_alone() -> None:
    rng = random.Random(3)
    for _ in range(300):
        words = sample_review(rng).split()
        odds = [log_odds(" ".join(words[:i]) + " ") for i in range(len(words) + 1)]
        assert np.abs(np.diff(odds)).max() < math.log(12)


GRAMMAR_WORDS = sorted({w for i in range(200) for w in sample_review(random.Random(i)).split()})


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(GRAMMAR_WORDS)).map(" ".join)))
def test_any_text_has_a_bounded_reward(text: str) -> None:
    assert abs(log_odds(text)) < 11
    assert 0 < positive_probability(text) < 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(0, 40), st.text(max_size=5))
def test_after_a_slip_the_rest_of_the_sentence_counts_nothing(
    seed: int, which: int, at: int, damage: str
) -> None:
    """The log-odds is a sum over sentences; a damaged one counts up to the damage."""
    sentences = re.findall(r"[^.!?]+[.!?]", sample_review(random.Random(seed)))
    which = min(which, len(sentences) - 1)
    before, through = "".join(sentences[:which]), "".join(sentences[: which + 1])
    words = sentences[which].split()
    at = min(at, len(words) - 1)
    understood = " ".join([before, *words[:at], ""])
    words.insert(at, "~" + re.sub(r"[\s.!?]", "", damage))
    damaged = " ".join([before, *words]) + "".join(sentences[which + 1 :])
    lost = log_odds(through) - log_odds(understood)
    assert log_odds(damaged) == pytest.approx(log_odds("".join(sentences)) - lost, abs=1e-9)


def test_a_cut_word_counts_what_it_begins_and_an_unknown_one_nothing() -> None:
    opening = "This movie was superb from the start."
    assert log_odds("This movie was superb fxom") == log_odds("This movie was superb ")
    assert log_odds(f"{opening} The songs were du") < log_odds(f"{opening} The songs were ")


def test_a_slip_cannot_unsay_what_was_said() -> None:
    assert log_odds("This movie was dreadful and oops. It was superb.") < -0.5


def test_repetition_earns_no_more_than_a_review() -> None:
    assert log_odds("superb " * 50) == 0.0
    assert log_odds("Superb. " * 50) == 0.0
    assert log_odds("The film was" + " superb" * 50) == log_odds("The film was superb ")
    closing = "Highly recommended."
    review = f"This movie was superb from the start. The songs stayed with me. {closing}"
    assert log_odds(f"{review} " + f"{closing} " * 20) == log_odds(review)
    assert log_odds(" ".join([review] * 20)) == log_odds(review)


def test_bound_of_the_log_odds() -> None:
    """A text is at most one sentence, or the beginning of one, from each row of the plan."""
    reader = Reader(automaton.compile_grammar(rules.RULES, rules.PLAN), len(rules.PLAN))

    @cache
    def most(state: State, sign: int) -> float:
        best = 0.0
        for word in {w for node, *_ in state.beliefs for w in reader.graph[node].words if w}:
            step = reader.step(state, word)
            assert step is not None
            rest = 0.0 if word.endswith((".", "!", "?")) else most(step[0], sign)
            best = max(best, sign * step[1] + rest)
        return best

    assert 5 < sum(most(row, 1) for row in reader.after_sentences) < 11
    assert 5 < sum(most(row, -1) for row in reader.after_sentences) < 11
