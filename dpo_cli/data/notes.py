"""What is told of rows that are kept as they are, since it may not be what was meant."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpo_cli.data.drops import DropReport
from dpo_cli.records import PreferenceExample, response_text


@dataclass(frozen=True)
class Ways:
    """How texts are written. parse: special tokens in them are tokens; templated: by the model's
    chat template; has_template: it has one."""

    parse: bool
    templated: bool
    has_template: bool


def note_texts(
    example: PreferenceExample, special: re.Pattern[str], ways: Ways, drops: DropReport
) -> None:
    """Special tokens in texts, texts for a chat model, and words that run into each other."""
    prompt = example.prompt
    prompts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
    responses = list(map(response_text, example.responses))
    found = next((m for text in (*prompts, *responses) if (m := special.search(text))), None)
    if found and not ways.parse:
        drops.add_note(
            f"special tokens such as {found.group()} in texts are read as characters; of texts "
            "that a chat template made, data.special_tokens=parse reads them as tokens",
            example.row,
        )
    if ways.templated or not isinstance(prompt, str) or found:
        return
    if ways.has_template:
        drops.add_note(
            "texts are used without the model's chat template; data.chat_template=always makes "
            "prompts messages of the user",
            example.row,
        )
    elif any(_runs_on(prompt, response) for response in responses):
        drops.add_note(
            "prompt and response are joined as they are, with nothing between their words",
            example.row,
        )


def _runs_on(prompt: str, response: str) -> bool:
    """Whether a letter or digit follows a prompt's last word or full stop at once."""
    before, after = prompt[-1:], response[:1]
    return bool(before and after) and after.isascii() and after.isalnum() and not before.isspace()
