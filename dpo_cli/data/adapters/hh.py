"""Anthropic HH (arXiv 2204.05862): `chosen` and `rejected` are whole transcripts."""

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
    """Prompt: the dialogue both share, up to its last `Assistant:`; response: what follows.

    With `chat_template: always`, as for a model that has one (`dataset.py`), the dialogue becomes
    messages instead of one text.
    """
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    prompt = shared_dialogue(chosen, rejected)
    pair = (chosen[len(prompt) :], rejected[len(prompt) :])
    for field, response in zip(("chosen", "rejected"), pair, strict=True):
        if HUMAN in response:
            raise BadRow("goes on with a human turn: the transcripts part before the end", field)
    if config.chat_template in ("auto", "never", "human_assistant"):
        yield PreferenceExample(prompt, pair, index)
        return
    stripped = (pair[0].strip(), pair[1].strip())
    yield PreferenceExample(talk_of(prompt), stripped, index)


def talk_of(prompt: str) -> list[Message]:
    """A dialogue's text, up to the last `Assistant:`, as messages. BadRow."""
    return prompt_messages(dialogue_messages(prompt), "chosen")


def shared_dialogue(chosen: str, rejected: str) -> str:
    """The longest text both begin with that ends in `Assistant:`.

    The last `Assistant:` of one transcript is not enough: some answers contain the
    marker themselves (5 of the 2,312 rows of harmless-base/test; in 4 of them it is the
    chosen one, and the rejected answer would be cut at a place it does not share). Nor
    is the longest common prefix: answers often begin with the same words.
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
        raise BadRow("begins with something that is not a turn", "chosen")
    turns = turns[:-2]  # the answer's turn, still empty
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(turns[::2], turns[1::2], strict=True)
    ]
