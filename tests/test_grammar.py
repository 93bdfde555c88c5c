"""The film reviews: calibration, wording, exact conditional sampling."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from dpo_cli.grammar import (
    choices,
    continue_review,
    log_odds,
    positive_probability,
    rules,
    sample_review,
)


@pytest.fixture(scope="module")
def labelled() -> tuple[list[str], np.ndarray, np.ndarray]:
    """20,000 reviews, their true sentiments and their posteriors."""
    rng = random.Random(2)
    sentiments = np.array([rng.random() < 0.5 for _ in range(20_000)])
    texts = [sample_review(rng, bool(s)) for s in sentiments]
    return texts, sentiments, np.array([positive_probability(t) for t in texts])


def test_posterior_is_calibrated(labelled: tuple[list[str], np.ndarray, np.ndarray]) -> None:
    _, sentiments, posterior = labelled
    for low in np.arange(0, 1, 0.1):
        inside_bin = (posterior >= low) & (posterior < low + 0.1)
        p = posterior[inside_bin]
        assert p.size > 400
        deviation = sentiments[inside_bin].sum() - p.sum()
        assert abs(deviation) < 4 * math.sqrt((p * (1 - p)).sum())


def test_posterior_is_spread_over_the_whole_interval(
    labelled: tuple[list[str], np.ndarray, np.ndarray],
) -> None:
    _, sentiments, posterior = labelled
    assert posterior.mean() == pytest.approx(0.5, abs=0.02)
    assert 0.3 < posterior.std() < 0.42
    assert ((posterior > 0.1) & (posterior < 0.9)).mean() > 0.3
    assert posterior.min() > 1e-4
    assert posterior.max() < 1 - 1e-4
    # Any density obeys E[P | positive] = 2 E[P^2] with even priors.
    positive = posterior[sentiments]
    error = positive.std() / math.sqrt(positive.size) + 2 * (posterior**2).std() / math.sqrt(20_000)
    assert abs(positive.mean() - 2 * (posterior**2).mean()) < 4 * error


def test_reviews_are_many_and_well_formed(
    labelled: tuple[list[str], np.ndarray, np.ndarray],
) -> None:
    texts = labelled[0]
    assert len(set(texts)) > 19_500
    sentences = Counter(s for t in texts for s in re.findall(r"[^.!?]+[.!?]", t))
    assert len(sentences) > 20_000
    assert 20 < np.mean([len(t.split()) for t in texts]) < 28
    for text in texts:
        assert re.fullmatch(r"([A-Z][\w' ,-]*[.!?] ?){1,4}", text), text
        assert text == " ".join(text.split())
        assert not re.search(r"\b([Aa] [aeiou]|[Aa]n [^aeiouh])", text), text
        assert not re.search(r"\bi\b|\b(\w+) \1\b", text), text
        plural = r"(characters|songs|actors|scenes|costumes|leads|jokes|moments|ideas)"
        assert not re.search(plural + r" was\b", text), text


def test_choices_by_hand() -> None:
    tilted = {t: (p, n) for t, p, n in choices.tilt(("best", "middle", "worst"), 1.0)}
    total = math.exp(0.25) + 1 + math.exp(-0.25)
    assert tilted["best"] == pytest.approx((math.exp(0.25) / total, math.exp(-0.25) / total))
    assert tilted["middle"] == pytest.approx((1 / total, 1 / total))
    assert math.log(tilted["worst"][0] / tilted["worst"][1]) == pytest.approx(-0.5)
    assert choices.lean(0.75, choices.even("a", "b"), choices.even("c")) == [
        ("a", 0.375, 0.125), ("b", 0.375, 0.125), ("c", 0.25, 0.75)
    ]  # fmt: skip
    assert choices.mix((3, [("a", 0.5, 1.0), ("b", 0.5, 0.0)]), (1, choices.even("c"))) == [
        ("a", 0.375, 0.75), ("b", 0.375, 0.0), ("c", 0.25, 0.25)
    ]  # fmt: skip
    assert choices.with_article([("uneven", 1, 1), ("dull", 1, 1)]) == [
        ("an uneven", 1, 1), ("a dull", 1, 1)
    ]  # fmt: skip


def test_every_symbol_is_defined_and_used() -> None:
    used = {symbol for row in rules.PLAN for symbol, _, _ in row if symbol}
    used |= {
        name
        for alternatives in rules.RULES.values()
        for template, _, _ in alternatives
        for name in re.findall(r"\{(\w+)\}", template)
    }
    assert used == set(rules.RULES)


def test_sampling_is_deterministic_and_takes_either_generator() -> None:
    assert sample_review(random.Random(4)) == sample_review(random.Random(4))
    one, two = np.random.default_rng(4), np.random.default_rng(4)
    assert [sample_review(one) for _ in range(3)] == [sample_review(two) for _ in range(3)]
    assert continue_review("The film", one) == continue_review("The film", two)


@pytest.mark.parametrize("sentiment", [None, True, False])
def test_continuations_follow_the_conditional_distribution(sentiment: bool | None) -> None:
    """The next word and the share of good endings as in rejection sampling."""
    prefix, draws = "The film was", 3000
    rng = random.Random(5)
    exact = [continue_review(prefix, rng, sentiment) for _ in range(draws)]
    rejected = []
    while len(rejected) < draws:
        review = sample_review(rng, sentiment)
        if review.startswith(prefix + " "):
            rejected.append(review.removeprefix(prefix))
    tallies = []
    for continuations in (exact, rejected):
        tally = Counter(c.split()[0] for c in continuations)
        tally["(good)"] = sum(log_odds(prefix + c) > 0 for c in continuations)
        tally["(short)"] = sum(len(c.split()) < 15 for c in continuations)
        tallies.append(tally)
    for word in tallies[0] | tallies[1]:
        a, b = tallies[0][word] / draws, tallies[1][word] / draws
        assert abs(a - b) < 4.5 * math.sqrt(2 * max(a, b) * (1 - min(a, b)) / draws), word


def test_posterior_of_a_prefix_is_the_mean_over_its_continuations() -> None:
    rng = random.Random(6)
    for prefix in ("This movie was superb", "I expected a", "On Sunday I saw an", "The children"):
        rewards = [positive_probability(prefix + continue_review(prefix, rng)) for _ in range(2000)]
        error = np.std(rewards) / math.sqrt(2000)
        assert abs(np.mean(rewards) - positive_probability(prefix + " ")) < 4 * error


def test_continuation_of_a_finished_review_is_empty_and_of_another_text_an_error() -> None:
    ended = "This movie was superb from the start. Highly recommended."
    assert continue_review(ended, random.Random(0)) == ""
    with pytest.raises(ValueError, match="begins with 'A cat'"):
        continue_review("A cat", random.Random(0))


def test_importing_the_grammar_stays_light() -> None:
    program = (
        "import sys, dpo_cli.grammar as g; g.log_odds('The film'); "
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
