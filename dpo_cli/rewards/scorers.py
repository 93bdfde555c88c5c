"""Rewards that need no model, by name: functions of completions.

To add one: a function here, a line of `SCORERS`, its schema in `config/rewards.py` and
`conf/reward_fn/x.yaml`. Rewards with a model are in `rewards/scoring.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpo_cli.errors import NonFiniteError
from dpo_cli.grammar import log_odds, positive_probability
from dpo_cli.records import Prompt


@dataclass(frozen=True)
class Completed:
    """A prompt as in its source, and a sampled completion.

    finished: ended with EOS, not truncated.
    """

    prompt: Prompt
    completion: str
    finished: bool = True

    @property
    def text(self) -> str:
        """Prompt and completion as one text; a chat as the contents of its messages."""
        return as_text(self.prompt) + self.completion


Scorer = Callable[[Sequence[Completed]], list[float]]


def as_text(prompt: Prompt) -> str:
    """The text itself, or the contents of a chat."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt) + "\n"


def sentiment(rows: Sequence[Completed]) -> list[float]:
    """p(positive | review) under the embedded grammar, exact, in [0, 1]."""
    return [positive_probability(row.text) for row in rows]


def sentiment_log_odds(rows: Sequence[Completed]) -> list[float]:
    """The log-odds of `sentiment`, below 11 either way."""
    return [log_odds(row.text) for row in rows]


def length(rows: Sequence[Completed]) -> list[float]:
    """Number of words: shows how length is exploited."""
    return [float(len(row.completion.split())) for row in rows]


def finite(scores: list[float]) -> list[float]:
    """The scores, unchanged; NonFiniteError if one is not finite."""
    if not all(map(math.isfinite, scores)):
        raise NonFiniteError("reward_fn: a score is not finite: the model overflows or is damaged")
    return scores


SCORERS: dict[str, Scorer] = {"sentiment": sentiment, "length": length}
