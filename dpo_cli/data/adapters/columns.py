"""Typed reading of a raw row's columns; what has another type raises `BadRow`."""

from __future__ import annotations

import math
from typing import Any

from dpo_cli.data.drops import MISSING, BadRow
from dpo_cli.records import Message

ROLES = ("system", "developer", "user", "assistant", "tool")


def column(row: dict[str, Any], field: str) -> Any:
    if field not in row:
        raise BadRow(MISSING, field)
    return row[field]


def text(row: dict[str, Any], field: str) -> str:
    return as_text(column(row, field), field)


def as_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"is {kind(value)}, not text", field)
    return value


def number(row: dict[str, Any], field: str) -> float:
    return as_number(column(row, field), field)


def as_number(value: Any, field: str) -> float:
    """A finite float; a bool is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"is {kind(value)}, not a number", field)
    # Python's integers have no upper limit, floats have
    if abs(value) > 1e300 or math.isnan(value):
        raise BadRow("is not a finite number", field)
    return float(value)


def as_bool(value: Any, field: str) -> bool:
    """True or False; 0, 1 and texts are neither."""
    if not isinstance(value, bool):
        raise BadRow(f"holds {kind(value)} where true or false should be", field)
    return value


def messages(value: Any, field: str) -> list[Message]:
    """`[{role, content}, ...]`, other keys left out; at least one message."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"is {kind(value)}, not a list of messages", field)
    for message in value:
        if not isinstance(message, dict):
            raise BadRow(f"holds {kind(message)} where a message should be", field)
        # roles are written by chat templates as they are: not the place for special tokens
        if message.get("role") not in ROLES:
            raise BadRow(f"has a message whose role is none of {', '.join(ROLES)}", field)
        if not isinstance(message.get("content"), str):
            raise BadRow("has a message whose content is not text", field)
    return [{"role": m["role"], "content": m["content"]} for m in value]


def prompt_messages(value: list[Message], field: str) -> list[Message]:
    """The same messages, which must leave the next turn to the assistant.

    Most chat templates render a prompt that ends otherwise without the assistant's header.
    """
    if not value:
        raise BadRow("has no message before the answer", field)
    if value[-1]["role"] not in {"user", "tool"}:
        raise BadRow(f"ends with a message of the {value[-1]['role']}, not the user", field)
    return value


def split_answer(value: Any, field: str) -> tuple[list[Message], str]:
    """A conversation's last message, which must be the assistant's, and those before it."""
    conversation = messages(value, field)
    if conversation[-1]["role"] != "assistant":
        raise BadRow(
            f"ends with a message of the {conversation[-1]['role']}, not the answer", field
        )
    return conversation[:-1], conversation[-1]["content"]


def kind(value: Any) -> str:
    """How a message names a value: `None`, `an empty list`, `int`."""
    if value is None:
        return "None"
    return "an empty list" if value == [] else type(value).__name__
