"""Parse conversations: lists of messages, or their JSON or Python text."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from dpo_cli.data.adapters.columns import kind
from dpo_cli.data.drops import BadRow
from dpo_cli.records import Message, Response

EMPTY: tuple[Any, ...] = (None, "", [], {})  # values of keys that are left out
ROLES = ("system", "developer", "user", "assistant", "tool")
WRITTEN = re.compile(r"""\s*\[\s*\{.{0,200}?["'](role|content)["']\s*:""", re.DOTALL)


def is_written(value: Any) -> bool:
    """Whether a value is the text of a list of messages, as written by CSV or Python's `str`."""
    return isinstance(value, str) and WRITTEN.match(value) is not None


def as_list(value: Any, field: str) -> Any:
    """Parse such a text; other values are returned unchanged."""
    if not is_written(value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise BadRow("is a list of messages as text, but neither valid JSON nor Python", field)


def messages(value: Any, field: str) -> list[Message]:
    """`[{role, content, ...}, ...]`; empty keys are left out."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"is {kind(value)}, not a list of messages", field)
    return [_message(message, field) for message in value]


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"has {kind(message)} instead of a message", field)
    # Chat templates write roles verbatim, so that others could contain special tokens.
    if message.get("role") not in ROLES:
        raise BadRow(f"has a message whose role is not one of {', '.join(ROLES)}", field)
    filled = {key: _filled(value) for key, value in message.items() if value not in EMPTY}
    if "tool_calls" in filled:
        calls = filled["tool_calls"]
        if not isinstance(calls, list):
            raise BadRow(f"has {kind(calls)} instead of a list of tool calls", field)
        filled["tool_calls"] = [_tool_call(call, field) for call in calls]
    return filled | {"content": _content(message, field)}


def _filled(value: Any) -> Any:
    """A value without null keys, which tables add where other rows have the key."""
    if isinstance(value, dict):
        return {key: _filled(part) for key, part in value.items() if part is not None}
    return [_filled(part) for part in value] if isinstance(value, list) else value


def _content(message: dict[str, Any], field: str) -> str:
    """The text of a message, or of a list of its parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(_part(part, field) for part in content)
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise BadRow("has a message whose content is not text", field)
    return content


def _part(part: Any, field: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str) or part.get("type", "text") != "text":
        type_ = part.get("type") if isinstance(part, dict) else kind(part)
        raise BadRow(f"has a message with a part of type {type_}; only text is supported", field)
    return text


def _tool_call(call: Any, field: str) -> dict[str, Any]:
    """A tool call with arguments as a dict, as templates expect (OpenAI's format: JSON text)."""
    if not isinstance(call, dict):
        raise BadRow(f"has {kind(call)} instead of a tool call", field)
    if isinstance(call.get("function"), dict):
        return call | {"function": _tool_call(call["function"], field)}
    if not isinstance(call.get("name"), str):
        raise BadRow("has a tool call without a function's name", field)
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise BadRow("has a tool call whose arguments are not valid JSON", field) from error
    return call | {"arguments": {} if arguments is None else arguments}


def tools(value: Any, field: str) -> list[Message] | None:
    """The tools of a conversation: a list of functions, or its JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("is not valid JSON", field) from error
    if value in EMPTY:
        return None
    functions = _filled(value)
    named = isinstance(functions, list) and all(
        isinstance(tool, dict) and isinstance(tool.get("function", tool), dict)
        and isinstance(tool.get("function", tool).get("name"), str) for tool in functions
    )  # fmt: skip
    if not named:
        raise BadRow("is not a list of functions with names", field)
    return list(functions)


def prompt_messages(value: list[Message], field: str) -> list[Message]:
    """The same messages, checked to end before the assistant's turn.

    Most chat templates render other prompts without the assistant's header.
    """
    if not value:
        raise BadRow("has no message before the answer", field)
    if value[-1]["role"] not in {"user", "tool"}:
        raise BadRow(f"ends with a message of role {value[-1]['role']} instead of user", field)
    return value


def split_answer(value: Any, field: str) -> tuple[list[Message], Response]:
    """(messages before the answer, the answer) of a conversation that ends with the assistant."""
    conversation = messages(value, field)
    *before, answer = conversation
    if answer["role"] != "assistant":
        raise BadRow(f"ends with a message of role {answer['role']} instead of assistant", field)
    more = answer.keys() - {"role", "content"}
    return before, answer if more else answer["content"]
