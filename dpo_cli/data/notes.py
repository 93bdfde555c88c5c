"""What is told of rows that are kept as they are, since it may not be what was meant."""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass

from dpo_cli.data.drops import DropReport
from dpo_cli.records import PreferenceExample, response_text

OPENING, QUOTES = "([{<\u201c\u2018\u00ab", "\"'`"
MARKS = "-*#\u2022\u2013\u2014$@"  # with which a list, a heading or a number begins


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


def note_scores(example: PreferenceExample, drops: DropReport) -> None:
    """Scores that do not say what the order of the responses says."""
    scores = example.scores or ()
    if any(better < worse for better, worse in itertools.pairwise(scores)):
        drops.add_note("the rejected response has the higher score", example.row)
    elif len(set(scores)) < len(scores):
        drops.add_note("some responses have the same score: their order is the row's", example.row)


def _runs_on(prompt: str, response: str) -> bool:
    """Whether a word, or what opens one, follows a prompt's last word or full stop at once, in a
    script that puts spaces between words. A comma or an ending does go on."""
    before, after = prompt[-1:], response[:1]
    opened = before in OPENING or (before in QUOTES and prompt[-2:-1].isspace())
    if not before or not after or before.isspace() or opened or _unspaced(before):
        return False
    return after in OPENING + QUOTES + MARKS or (after.isalnum() and not _unspaced(after))


def _unspaced(letter: str) -> bool:
    """Of Chinese, Japanese, Thai and the like, punctuation included."""
    return unicodedata.east_asian_width(letter) in "WF" or "\u0e00" <= letter <= "\u109f"
