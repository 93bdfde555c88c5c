"""Your own rows: text or chat prompts with a pair, a ranked list or one demonstration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dpo_cli.config import JsonlDataConfig
from dpo_cli.config.datasets import ROW_TERMS, row_terms
from dpo_cli.data.adapters.columns import as_bool, as_number, as_text, column, kind, number
from dpo_cli.data.adapters.formats import in_columns
from dpo_cli.data.adapters.messages import (
    as_list,
    messages,
    prompt_messages,
    split_answer,
    tools,
)
from dpo_cli.data.drops import BadRow
from dpo_cli.data.template import TOOLS
from dpo_cli.errors import ConfigError
from dpo_cli.records import Message, PreferenceExample, Prompt, Response


def parse(row: dict[str, Any], index: int, config: JsonlDataConfig) -> Iterable[PreferenceExample]:
    """Columns are named by `data.*_field`, or those of `data.format` (see formats.py).

    A prompt is a text or a list of messages. A response is a text or a conversation whose last
    message is the answer; the messages before it must equal the prompt (or end with it, if that is
    a text), or are the prompt if the row has none. A list of responses with scores is sorted by
    them. With a system message or tools, a text prompt becomes a user message.
    """
    terms = _terms(row, config)  # of the row's own columns, whatever its format
    row, config = in_columns(row, config)
    answers = _answers(row, config)
    split = [_response(value, field) for field, value in answers]
    prompt = _prompt(row, config, split[0][0] if split else [])
    for (field, _), (before, _) in zip(answers, split, strict=True):
        prompt = _agreed(prompt, before, field)
    responses = tuple(response for _, response in split)
    scores = _scores(row, config, len(split))
    finished = _finished(row, config.finished_field, len(split))
    if scores is not None and config.responses_field is not None:
        if len(scores) > 1 and len(set(scores)) == 1:
            raise BadRow(
                "are all equal, so that no response is preferred", str(config.scores_field)
            )
        order = list(np.argsort(-np.array(scores), kind="stable"))
        responses = tuple(responses[place] for place in order)
        finished = None if finished is None else tuple(finished[place] for place in order)
        scores = tuple(scores[place] for place in order)
    prompt = _with_tools(_with_system(prompt, row, config), row, config)
    if config.turns == "all":
        yield from _earlier_turns(prompt, len(responses), index, terms)
    yield PreferenceExample(prompt, responses, index, scores, finished, terms)


def _earlier_turns(
    prompt: Prompt, responses: int, index: int, terms: tuple[float, ...] | None
) -> Iterable[PreferenceExample]:
    """The assistant's turns in a prompt, each as the response to the messages before it."""
    if responses > 1:
        raise ConfigError("data.turns=all: is for rows with one response, not for pairs and lists")
    turns = [] if isinstance(prompt, str) else prompt
    for place, message in enumerate(turns):
        if place and message["role"] == "assistant" and turns[place - 1]["role"] != "assistant":
            answer = message if message.keys() - {"role", "content"} else message["content"]
            yield PreferenceExample(turns[:place], (answer,), index, terms=terms)


def _answers(row: dict[str, Any], config: JsonlDataConfig) -> list[tuple[str, Any]]:
    """(column, value) of each response, best first."""
    if config.responses_field is None:
        rejected = None if config.label_field else config.rejected_field
        fields = (config.chosen_field, rejected)
        return [(field, column(row, field)) for field in fields if field is not None]
    name = config.responses_field
    ranked = as_list(column(row, name), name)
    if not isinstance(ranked, list) or not (ranked or config.format == "prompts"):
        raise BadRow(f"is {kind(ranked)}, not a list of responses", name)
    return [(name, value) for value in ranked]


def _response(value: Any, field: str) -> tuple[list[Message], Response]:
    """The messages before the answer (none if it is a text), and the answer."""
    value = as_list([value] if isinstance(value, dict) else value, field)
    return split_answer(value, field) if isinstance(value, list) else ([], as_text(value, field))


def _prompt(row: dict[str, Any], config: JsonlDataConfig, implied: list[Message]) -> Prompt:
    name = config.prompt_field
    if implied and (name is None or row.get(name) is None):
        return prompt_messages(implied, config.chosen_field)
    if name is None:
        raise BadRow("has no message before the answer", config.chosen_field)
    value = as_list(column(row, name), name)
    if isinstance(value, list):
        return prompt_messages(messages(value, name), name)
    return as_text(value, name)


def _agreed(prompt: Prompt, before: list[Message], field: str) -> Prompt:
    """The prompt, given by a column or before an answer. BadRow if the two differ."""
    if not before or before == prompt:
        return before or prompt
    if before[0]["role"] in {"assistant", "tool"}:
        raise BadRow("has several turns; the answer must be a single message", field)
    if isinstance(prompt, str) and before[-1]["content"].strip() == prompt.strip():
        return prompt_messages(before, field)  # the text is the last message of the conversation
    raise BadRow("answers a different prompt", field)


def _with_system(prompt: Prompt, row: dict[str, Any], config: JsonlDataConfig) -> Prompt:
    """The prompt preceded by the system message of a separate column, if the row has one."""
    name = config.system_field
    value = None if name is None else row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return prompt
    message: Message = {"role": "system", "content": as_text(value, str(name))}
    if isinstance(prompt, str):
        return [message, {"role": "user", "content": prompt}]
    if prompt[0]["role"] not in ("system", "developer"):
        return [message, *prompt]
    if prompt[0]["content"].strip() != value.strip():
        raise BadRow("differs from the system message of the prompt", str(name))
    return prompt


def _with_tools(prompt: Prompt, row: dict[str, Any], config: JsonlDataConfig) -> Prompt:
    name = config.tools_field
    functions = None if name is None else tools(row.get(name), name)
    if functions is None:
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return [prompt[0] | {TOOLS: functions}, *prompt[1:]]


def _scores(row: dict[str, Any], config: JsonlDataConfig, count: int) -> tuple[float, ...] | None:
    if config.label_field is not None:
        value = column(row, config.label_field)
        if isinstance(value, str):  # of a CSV
            value = {"true": 1, "1": 1, "false": 0, "0": 0}.get(value.strip().lower(), value)
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRow(f"is {kind(value)}, not true or false, 1 or 0", config.label_field)
        return (float(value),)
    field = config.scores_field
    if field is None:
        return None
    values = column(row, field)
    if not isinstance(values, list) or len(values) != count:
        raise BadRow(f"is not a list of {count} scores, one per response", field)
    return tuple(as_number(value, field) for value in values)


def _terms(row: dict[str, Any], config: JsonlDataConfig) -> tuple[float, ...] | None:
    terms = []
    for name, field in row_terms(config).items():
        terms.append(number(row, field))
        if problem := ROW_TERMS[name].problem(terms[-1]):
            raise BadRow(f"is {terms[-1]:g}, {problem}", field)
    return tuple(terms) or None


def _finished(row: dict[str, Any], field: str | None, count: int) -> tuple[bool, ...] | None:
    if field is None:
        return None
    values = column(row, field)
    if not isinstance(values, list) or len(values) != count:
        raise BadRow(f"is not a list of {count} bools, one per response", field)
    return tuple(as_bool(value, field) for value in values)
