"""Your own rows: text or chat prompts, a pair, a ranked list or one demonstration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpo_cli.config import JsonlDataConfig
from dpo_cli.data.adapters.columns import (
    as_bool,
    as_number,
    as_text,
    column,
    kind,
    messages,
    prompt_messages,
    split_answer,
)
from dpo_cli.data.drops import BadRow
from dpo_cli.records import Message, PreferenceExample

Prompt = str | list[Message]


def parse(row: dict[str, Any], index: int, config: JsonlDataConfig) -> Iterable[PreferenceExample]:
    """Columns as `data.*_field` names them.

    A prompt is a text or a list of messages. A response is a text or a conversation whose
    last message is the answer; what comes before it must be the prompt, or, in a row
    without a prompt column, is the prompt.
    """
    answers = _answers(row, config)
    split = [_response(value, field) for field, value in answers]
    prompt = _prompt(row, config, split[0][0])
    for (field, _), (before, _) in zip(answers, split, strict=True):
        if before and before != _as_messages(prompt):
            raise BadRow("answers another prompt", field)
        prompt = before or prompt  # a chat row stays one where its prompt column is a text
    scores = _scores(row, config.scores_field, len(split))
    finished = _finished(row, config.finished_field, len(split))
    yield PreferenceExample(prompt, tuple(text for _, text in split), index, scores, finished)


def _answers(row: dict[str, Any], config: JsonlDataConfig) -> list[tuple[str, Any]]:
    """(column, value) of each response, best first."""
    if config.responses_field is None:
        fields = (config.chosen_field, config.rejected_field)
        return [(field, column(row, field)) for field in fields if field is not None]
    name = config.responses_field
    ranked = column(row, name)
    if not isinstance(ranked, list) or not ranked:
        raise BadRow(f"is {kind(ranked)}, not a list of responses", name)
    return [(name, value) for value in ranked]


def _response(value: Any, field: str) -> tuple[list[Message], str]:
    """The messages before the answer (none where it is a text), and the answer."""
    return split_answer(value, field) if isinstance(value, list) else ([], as_text(value, field))


def _prompt(row: dict[str, Any], config: JsonlDataConfig, implied: list[Message]) -> Prompt:
    if config.prompt_field not in row and implied:
        return prompt_messages(implied, config.chosen_field)
    value = column(row, config.prompt_field)
    if isinstance(value, list):
        return prompt_messages(messages(value, config.prompt_field), config.prompt_field)
    return as_text(value, config.prompt_field)


def _as_messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _scores(row: dict[str, Any], field: str | None, count: int) -> tuple[float, ...] | None:
    if field is None:
        return None
    values = column(row, field)
    if not isinstance(values, list) or len(values) != count:
        raise BadRow(f"is not a list of {count} scores, one a response", field)
    return tuple(as_number(value, field) for value in values)


def _finished(row: dict[str, Any], field: str | None, count: int) -> tuple[bool, ...] | None:
    if field is None:
        return None
    values = column(row, field)
    if not isinstance(values, list) or len(values) != count:
        raise BadRow(f"is not a list of {count} bools, one a response", field)
    return tuple(as_bool(value, field) for value in values)
