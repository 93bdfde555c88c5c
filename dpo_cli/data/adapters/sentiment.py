"""The embedded film reviews: prompts, continuations and their exact ground-truth scores."""

from __future__ import annotations

import random

from dpo_cli.config import SentimentDataConfig
from dpo_cli.errors import ConfigError
from dpo_cli.grammar import continue_review, log_odds, sample_review
from dpo_cli.records import PreferenceExample

LONGEST_PROMPT = 20  # words; many reviews have no more


def generate(
    config: SentimentDataConfig, seed: int
) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """`rows` (at most `max_rows`) training and `eval_rows` held-out examples.

    The prompt is the first k words of a longer review, k uniform in [min_prompt_words,
    max_prompt_words]; the responses are independent continuations from the grammar, best first,
    each with its leading space; scores are the `log_odds` of prompt + response. Deterministic in
    (config, seed): each row has its own random stream, so more rows extend the data and prompts do
    not depend on the number of responses. Two responses may coincide (about 1 pair in 1000).
    Raises ConfigError.
    """
    _check(config)
    rows = config.rows if config.max_rows is None else min(config.rows, config.max_rows)
    return (
        [_example(config, seed, "train", row) for row in range(rows)],
        [_example(config, seed, "eval", row) for row in range(int(config.eval_rows or 0))],
    )


def _example(config: SentimentDataConfig, seed: int, split: str, row: int) -> PreferenceExample:
    assert config.responses is not None  # config/read.py sets it by stage
    rng = random.Random(f"{seed} {split} {row}")  # a string seed is hashed: independent streams
    count = rng.randint(config.min_prompt_words, config.max_prompt_words)
    words = sample_review(rng).split()
    while len(words) <= count:
        words = sample_review(rng).split()
    prompt = " ".join(words[:count])
    responses = [_continuation(prompt, rng) for _ in range(config.responses)]
    ranked = sorted(responses, key=lambda r: log_odds(prompt + r), reverse=True)
    scores = tuple(log_odds(prompt + response) for response in ranked)
    return PreferenceExample(prompt, tuple(ranked), row, scores)


def _continuation(prompt: str, rng: random.Random) -> str:
    """A continuation of at least one word (the review could also end with the prompt)."""
    while True:
        response = continue_review(prompt, rng)
        if response:
            return response


def _check(config: SentimentDataConfig) -> None:
    low, high = config.min_prompt_words, config.max_prompt_words
    if not 1 <= low <= high <= LONGEST_PROMPT:
        raise ConfigError(
            f"data.min_prompt_words={low}, data.max_prompt_words={high}: "
            f"need 1 <= min <= max <= {LONGEST_PROMPT}"
        )
    least = {"rows": 0, "max_rows": 0, "eval_rows": 0, "responses": 1}
    for key, smallest in least.items():
        value = getattr(config, key)
        if value is not None and value < smallest:
            raise ConfigError(f"data.{key}={value}: must be at least {smallest}")
