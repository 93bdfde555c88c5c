"""Pairs of sampled completions: which are compared, and which one of two is preferred."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from random import Random

import numpy as np
import torch
from torch import Tensor

from dpo_cli.config import OnlineDpoConfig
from dpo_cli.config.stages.dpo import losses_of
from dpo_cli.errors import DataError
from dpo_cli.evaluation.judge import Decision, Judge, Match, Verdict
from dpo_cli.evaluation.labels import Pair, best_and_worst, bradley_terry, net_wins
from dpo_cli.evaluation.win_rate import decide
from dpo_cli.losses import LOSSES, Comparisons
from dpo_cli.rewards.scorers import Completed
from dpo_cli.session.session import Session


@dataclass(frozen=True)
class Compared:
    """The comparisons of one prompt's completions.

    responses: indices of the completions that are compared, best first; pairs: places in it.
    """

    responses: list[int]
    pairs: list[Pair]

    @property
    def is_ranking(self) -> bool:
        """Whether every two responses are compared, and the earlier one is always preferred."""
        count = len(self.responses)
        ordered = all(pair.chosen < pair.rejected for pair in self.pairs)
        return ordered and len(self.pairs) == count * (count - 1) // 2


def compare(
    decided: Sequence[Pair],
    ids: Sequence[np.ndarray],
    stage: OnlineDpoConfig,
    scores: Sequence[float] | None,
    rng: Random,
) -> Compared | None:
    """The comparisons to learn from; None if no two different completions are ranked.

    decided: every two completions of the prompt that are ranked; ids: the completions' tokens;
    scores: for labels drawn at random.
    """
    pairs = list(decided)
    if stage.pairs == "best_worst":
        pairs = best_and_worst(pairs, len(ids))
    pairs = [p for p in pairs if not np.array_equal(ids[p.chosen], ids[p.rejected])]
    if stage.labels == "bradley_terry" and scores is not None:
        pairs = bradley_terry(pairs, scores, stage.label_temperature, rng)
    net = net_wins(pairs, len(ids))
    order = sorted(range(len(ids)), key=lambda i: -net[i])
    if stage.pairs == "best_worst":
        order = [order[0], order[-1]]
    places = {response: place for place, response in enumerate(order)}
    found = Compared(order, [Pair(places[p.chosen], places[p.rejected]) for p in pairs])
    if not pairs or (not found.is_ranking and any(LOSSES[x].lists for x in losses_of(stage))):
        return None
    return found


def most_pairs(stage: OnlineDpoConfig) -> int:
    """Pairs of a prompt without ties."""
    return 1 if stage.pairs == "best_worst" else matches_of(stage)


def matches_of(stage: OnlineDpoConfig) -> int:
    """Matches between a prompt's completions."""
    return stage.completions * (stage.completions - 1) // 2


def by_judge(
    session: Session, judge: Judge, rows: Sequence[Sequence[Completed]]
) -> tuple[list[list[Pair]], list[Decision]]:
    """Every two completions of a prompt of which the judge prefers one. DataError if it gives no
    verdict on any."""
    matches = [Match(a, b) for row in rows for a, b in combinations(row, 2)]
    decisions = decide(session, judge, matches, lambda done: None)
    verdicts = Counter(decision.verdict for decision in decisions)
    if verdicts[Verdict.ERROR] + verdicts[Verdict.UNASKED] == len(matches):
        raise DataError(
            f"judge {judge.name}: no verdict on any of {len(matches):,} matches of a round: "
            f"{decisions[0].reason}; resume once the judge answers, its answers so far are cached"
        )
    left = iter(decisions)
    pairs: list[list[Pair]] = []
    for row in rows:
        numbered = list(combinations(range(len(row)), 2))
        verdicts_of_row = zip(numbered, islice(left, len(numbered)), strict=True)
        pairs.append([
            Pair(a, b) if decision.verdict is Verdict.WIN else Pair(b, a)
            for (a, b), decision in verdicts_of_row
            if decision.verdict in (Verdict.WIN, Verdict.LOSS)
        ])  # fmt: skip
    return pairs, decisions


def comparisons(pairs: Sequence[Tensor], branches: int) -> Comparisons:
    """Those of some examples with K = `branches` responses each. pairs: (P, 2) of each."""
    return Comparisons(
        torch.cat([own + i * branches for i, own in enumerate(pairs)]),
        torch.cat([own.new_full((len(own),), i) for i, own in enumerate(pairs)]),
        torch.cat([torch.full((len(own),), 1 / len(own), device=own.device) for own in pairs]),
    )
