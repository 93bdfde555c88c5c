"""Anthropic HH (arXiv 2204.05862): `chosen` and `rejected` are complete transcripts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dpo_cli.config import HhDataConfig
from dpo_cli.data.adapters.columns import text
from dpo_cli.data.adapters.messages import prompt_messages
from dpo_cli.data.drops import BadRow
from dpo_cli.records import Message, PreferenceExample

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"


def parse(row: dict[str, Any], index: int, config: HhDataConfig) -> Iterable[PreferenceExample]:
    """Prompt: the shared dialogue up to its last `Assistant:`; response: the rest.

    With `chat_template: always`, set for chat models by `dataset.for_tokenizer`, the dialogue
    becomes messages instead of one text.
    """
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    prompt = shared_dialogue(chosen, rejected)
    pair = (chosen[len(prompt) :], rejected[len(prompt) :])
    for field, response in zip(("chosen", "rejected"), pair, strict=True):
        if HUMAN in response:
            raise BadRow("has a human turn after the point where the transcripts differ", field)
    if config.chat_template in ("auto", "never", "human_assistant"):
        yield PreferenceExample(prompt, pair, index)
        return
    stripped = (pair[0].strip(), pair[1].strip())
    yield PreferenceExample(to_messages(prompt), stripped, index)


def to_messages(prompt: str) -> list[Message]:
    """A dialogue's text, up to the last `Assistant:`, as messages. Raises BadRow."""
    return prompt_messages(dialogue_messages(prompt), "chosen")


def shared_dialogue(chosen: str, rejected: str) -> str:
    """The longest text both begin with that ends in `Assistant:`.

    The last `Assistant:` of one transcript is not enough, as some answers contain the marker (5 of
    the 2,312 rows of harmless-base/test). Nor is the longest common prefix, as answers often begin
    with the same words.
    """
    end = chosen.rfind(ASSISTANT)
    while end >= 0:
        prompt = chosen[: end + len(ASSISTANT)]
        if rejected.startswith(prompt):
            return prompt
        end = chosen.rfind(ASSISTANT, 0, end)
    raise BadRow("shares no dialogue with chosen", "rejected")


def dialogue_messages(prompt: str) -> list[Message]:
    before, *turns = re.split(r"\n\n(Human|Assistant):", prompt)
    if before.strip():
        raise BadRow("does not begin with a turn", "chosen")
    turns = turns[:-2]  # the answer's turn, still empty
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(turns[::2], turns[1::2], strict=True)
    ]
