"""Stanford Human Preferences: two Reddit answers to a post, with their votes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpo_cli.config import ShpDataConfig
from dpo_cli.data.adapters.columns import column, number, text
from dpo_cli.data.drops import BadRow
from dpo_cli.records import PreferenceExample


def parse(row: dict[str, Any], index: int, config: ShpDataConfig) -> Iterable[PreferenceExample]:
    """`labels` 1: A is preferred. Pairs below `min_score_ratio` are dropped (and counted).

    Prompt and responses have the dialogue format of the DPO reference code.
    """
    prompt = f"\n\nHuman: {text(row, 'history')}\n\nAssistant:"
    a, b = text(row, "human_ref_A"), text(row, "human_ref_B")
    scores = number(row, "score_A"), number(row, "score_B")
    if min(scores) <= 0:
        raise BadRow("is not positive, so the votes have no ratio", "score_A or score_B")
    if max(scores) / min(scores) < config.min_score_ratio:
        raise BadRow(f"is below data.min_score_ratio={config.min_score_ratio:g}", "score ratio")
    label = column(row, "labels")
    if label not in (0, 1):
        raise BadRow("is neither 1 (A is better) nor 0", "labels")
    pair, votes = ((f" {a}", f" {b}"), scores) if label == 1 else ((f" {b}", f" {a}"), scores[::-1])
    yield PreferenceExample(prompt, pair, index, votes)
