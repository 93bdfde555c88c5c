"""Judges decide which of two completions of a prompt is better: here by reward, in `judge_http.py`
by a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from dpo_cli.rewards.scorers import Completed, Scorer


class Verdict(StrEnum):
    """The result for the policy's completion. error: no usable answer; unasked: no calls left."""

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
    """reason: the judge's answer, or why there is none."""

    verdict: Verdict
    reason: str | None = None


Tick = Callable[[int], None]


class Judge(Protocol):
    """name: its label in tables of win rates."""

    @property
    def name(self) -> str: ...

    def __call__(self, matches: Sequence[Match], tick: Tick) -> list[Decision]:
        """One decision per match, in order; `tick(n)` after every n."""
        ...


def without_verdict(decisions: Sequence[Decision]) -> Iterator[str]:
    """A note on the missing verdicts of each kind, with the first reason."""
    for verdict in (Verdict.ERROR, Verdict.UNASKED):
        reasons = [d.reason for d in decisions if d.verdict is verdict]
        if reasons:
            yield (
                f"judge: {len(reasons):,} of {len(decisions):,} matches without a verdict: "
                f"{reasons[0]}"
            )


@dataclass(frozen=True)
class RewardJudge:
    """The higher reward wins, equal rewards tie, NaN is an error."""

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
