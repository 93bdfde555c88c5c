"""UltraFeedback, binarized: `chosen` and `rejected` are conversations, with scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpo_cli.config import UltrafeedbackDataConfig
from dpo_cli.data.adapters.columns import column, number
from dpo_cli.data.adapters.messages import prompt_messages, split_answer
from dpo_cli.data.drops import BadRow
from dpo_cli.records import PreferenceExample


def parse(
    row: dict[str, Any], index: int, config: UltrafeedbackDataConfig
) -> Iterable[PreferenceExample]:
    """The prompt is the conversation before the answer, which both responses must share."""
    del config
    prompt, chosen = split_answer(column(row, "chosen"), "chosen")
    other, rejected = split_answer(column(row, "rejected"), "rejected")
    if other != prompt:
        raise BadRow("answers a different prompt than chosen", "rejected")
    scores = number(row, "score_chosen"), number(row, "score_rejected")
    yield PreferenceExample(prompt_messages(prompt, "chosen"), (chosen, rejected), index, scores)
