"""Messages with their texts replaced by marks, to locate each in a rendered chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_cli.records import Message

UNMARKED = ("role",)
# Tags at which templates split an answer; marks replace the texts between them.
TAGS = re.compile(r"(</?(?:think|thinking|reasoning|tool_call|tool_response)>)")


def leaves(message: Message) -> Iterator[tuple[str, str]]:
    """(key, text) of every text in a message, including arguments of its tool calls."""
    for key, value in message.items():
        if key not in UNMARKED:
            yield from ((key, text) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from (part for part in TAGS.split(value)[::2] if part.strip())
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def hollow(messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
    """The messages with a mark in place of each text, and the text of each mark.

    Whitespace around a text stays outside its mark, as templates strip it.
    """
    texts: dict[str, str] = {}

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return "".join(
                part if place % 2 else _marked_text(part, texts)
                for place, part in enumerate(TAGS.split(value))
            )
        if isinstance(value, dict):
            return {key: marked(part) for key, part in value.items()}
        return [marked(part) for part in value] if isinstance(value, list) else value

    unmarked = UNMARKED
    return [{k: v if k in unmarked else marked(v) for k, v in m.items()} for m in messages], texts


def _marked_text(text: str, texts: dict[str, str]) -> str:
    core = text.strip()
    if not core:
        return text
    mark = f"\ue0f3{len(texts)}\ue0f4"
    texts[mark] = core
    start = text.index(core)
    return text[:start] + mark + text[start + len(core) :]
