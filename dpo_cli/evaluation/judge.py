"""A judge says which of two completions of a prompt is better; the policy's comes first.

By reward here; by a language model in `judge_http.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from dpo_cli.rewards.scorers import Completed, Scorer


class Verdict(StrEnum):
    """Of the policy's completion. error: no usable answer; unasked: no calls were left."""

    WIN = "win"
    LOSS = "loss"
    TIE = "tie"
    ERROR = "error"
    UNASKED = "unasked"


@dataclass(frozen=True)
class Match:
    """Two completions of one prompt: the policy's and its opponent's."""

    ours: Completed
    theirs: Completed


@dataclass(frozen=True)
class Decision:
    """reason: what the judge said, or why it said nothing."""

    verdict: Verdict
    reason: str | None = None


Tick = Callable[[int], None]


class Judge(Protocol):
    """name: what a table of win rates calls it."""

    @property
    def name(self) -> str: ...

    def __call__(self, matches: Sequence[Match], tick: Tick) -> list[Decision]:
        """A decision a match, in their order; `tick(n)` after every n."""
        ...


@dataclass(frozen=True)
class RewardJudge:
    """The higher reward wins, equal ones are a tie; one that is not a number is an error."""

    scorer: Scorer
    name: str

    def __call__(self, matches: Sequence[Match], tick: Tick) -> list[Decision]:
        rewards = self.scorer([m.ours for m in matches] + [m.theirs for m in matches])
        both = zip(rewards[: len(matches)], rewards[len(matches) :], strict=True)
        decisions = [_by_reward(ours, theirs) for ours, theirs in both]
        tick(len(matches))
        return decisions


def _by_reward(ours: float, theirs: float) -> Decision:
    reason = f"reward {ours:.4g} against {theirs:.4g}"
    if math.isnan(ours) or math.isnan(theirs):
        return Decision(Verdict.ERROR, reason)
    if ours == theirs:
        return Decision(Verdict.TIE, reason)
    return Decision(Verdict.WIN if ours > theirs else Verdict.LOSS, reason)
