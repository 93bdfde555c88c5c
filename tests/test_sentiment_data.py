"""data=sentiment: prompts and continuations with exact scores, a function of (config, seed)."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from dpo_cli.config import SentimentDataConfig
from dpo_cli.data.adapters.sentiment import generate
from dpo_cli.errors import ConfigError
from dpo_cli.grammar import continue_review, log_odds, positive_probability
from dpo_cli.records import PreferenceExample

PAIRS = SentimentDataConfig(rows=300, eval_rows=60, responses=2)


@pytest.fixture(scope="module")
def pairs() -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    return generate(PAIRS, seed=0)


def test_rows_are_a_function_of_config_and_seed(
    pairs: tuple[list[PreferenceExample], list[PreferenceExample]],
) -> None:
    assert generate(PAIRS, seed=0) == pairs
    train, held_out = pairs
    other_train, other_held_out = generate(PAIRS, seed=1)
    for a, b in [(train, other_train), (held_out, other_held_out), (train, held_out)]:
        same = [x for x, y in zip(a, b, strict=False) if x == y]
        assert not same
    assert [e.row for e in train] == list(range(300))
    assert [e.row for e in held_out] == list(range(60))


def test_more_rows_extend_the_data_and_more_responses_keep_the_prompts(
    pairs: tuple[list[PreferenceExample], list[PreferenceExample]],
) -> None:
    train, held_out = pairs
    fewer = generate(replace(PAIRS, rows=10, eval_rows=5), seed=0)
    assert fewer == (train[:10], held_out[:5])
    assert generate(replace(PAIRS, max_rows=7), seed=0)[0] == train[:7]
    four = generate(replace(PAIRS, responses=4), seed=0)[0]
    assert [e.prompt for e in four] == [e.prompt for e in train]
    assert generate(replace(PAIRS, rows=3, eval_rows=None), seed=0) == (train[:3], [])


@pytest.mark.parametrize("responses", [1, 2, 5])
def test_responses_are_reviews_of_the_grammar_best_first(responses: int) -> None:
    examples = generate(replace(PAIRS, responses=responses), seed=3)[0]
    for example in examples:
        assert isinstance(example.prompt, str)
        assert len(example.responses) == responses
        assert example.scores is not None
        assert list(example.scores) == sorted(example.scores, reverse=True)
        for response, score in zip(example.responses, example.scores, strict=True):
            assert response[0] == " "
            assert response[1] != " "
            text = example.prompt + response
            assert score == log_odds(text)
            continue_review(text, random.Random(0))  # raises outside the grammar


def test_prompt_lengths_are_uniform_over_their_range() -> None:
    examples = generate(replace(PAIRS, rows=2100, responses=1), seed=4)[0]
    counts = np.bincount([len(e.prompt.split()) for e in examples])
    assert counts.sum() == counts[2:9].sum()
    assert np.abs(counts[2:9] - 300).max() < 4.5 * math.sqrt(300 * 6 / 7)


def test_a_demonstration_is_an_unbiased_sample() -> None:
    """Mean reward: 0.5 overall, and on average that of the prompt alone."""
    examples = generate(replace(PAIRS, rows=3000, responses=1), seed=5)[0]
    rewards = np.array([positive_probability(e.prompt + e.responses[0]) for e in examples])
    prompts = np.array([positive_probability(f"{e.prompt} ") for e in examples])
    assert abs(rewards.mean() - 0.5) < 4 * rewards.std() / math.sqrt(3000)
    change = rewards - prompts
    assert abs(change.mean()) < 4 * change.std() / math.sqrt(3000)


def test_the_two_responses_are_exchangeable_before_ranking() -> None:
    """E[max] + E[min] = 2 E[single], and ranking leaves a clear margin."""
    examples = generate(replace(PAIRS, rows=3000), seed=6)[0]
    rewards = np.array(
        [[positive_probability(e.prompt + r) for r in e.responses] for e in examples]
    )
    both = rewards.sum(1)
    assert abs(both.mean() - 1.0) < 4 * both.std() / math.sqrt(3000)
    assert (rewards[:, 0] - rewards[:, 1]).mean() > 0.25
    assert np.mean([e.responses[0] == e.responses[1] for e in examples]) < 0.01


@pytest.mark.parametrize(
    ("key", "value"),
    [("min_prompt_words", 0), ("min_prompt_words", 9), ("max_prompt_words", 21),
     ("rows", -1), ("eval_rows", -1), ("responses", 0)],
)  # fmt: skip
def test_impossible_values_name_their_key(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"data.{key}={value}"):
        generate(replace(PAIRS, **{key: value}), seed=0)
