"""Notes on rows that are used unchanged but may not be what was meant."""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass

from dpo_cli.data.drops import DropReport
from dpo_cli.records import PreferenceExample, response_text

OPENING, QUOTES = "([{<\u201c\u2018\u00ab", "\"'`"
MARKS = "-*#\u2022\u2013\u2014$@"  # that begin a list, a heading or a number


@dataclass(frozen=True)
class TextHandling:
    """How texts are encoded. parse: special tokens in texts are parsed; templated: plain prompts
    are rendered by the chat template; has_template: the tokenizer has one."""

    parse: bool
    templated: bool
    has_template: bool


def note_texts(
    example: PreferenceExample, special: re.Pattern[str], handling: TextHandling, drops: DropReport
) -> None:
    """Note special tokens in texts, plain texts for a chat model, and missing separators."""
    prompt = example.prompt
    prompts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
    responses = list(map(response_text, example.responses))
    match = next((m for text in (*prompts, *responses) if (m := special.search(text))), None)
    if match and not handling.parse:
        drops.add_note(
            f"special tokens such as {match.group()} in texts are encoded as plain text; if a chat "
            "template has rendered the texts already, set data.special_tokens=parse",
            example.row,
        )
    if handling.templated or not isinstance(prompt, str) or match:
        return
    if handling.has_template:
        drops.add_note(
            "texts are used without the model's chat template; data.chat_template=always renders "
            "prompts as user messages",
            example.row,
        )
    elif any(_lacks_separator(prompt, response) for response in responses):
        drops.add_note(
            "prompt and response are concatenated verbatim, without a separator between words",
            example.row,
        )


def note_scores(example: PreferenceExample, drops: DropReport) -> None:
    """Note scores that contradict the order of the responses, or are equal."""
    scores = example.scores or ()
    if any(better < worse for better, worse in itertools.pairwise(scores)):
        drops.add_note("the rejected response has the higher score", example.row)
    elif len(set(scores)) < len(scores):
        drops.add_note("some responses have the same score: their order is the row's", example.row)


def _lacks_separator(prompt: str, response: str) -> bool:
    """Whether a word, or an opening mark, directly follows the prompt's last word or full stop, in
    a script with spaces between words. A comma or a suffix may continue a word."""
    before, after = prompt[-1:], response[:1]
    opened = before in OPENING or (before in QUOTES and prompt[-2:-1].isspace())
    if not before or not after or before.isspace() or opened or _unspaced(before):
        return False
    return after in OPENING + QUOTES + MARKS or (after.isalnum() and not _unspaced(after))


def _unspaced(letter: str) -> bool:
    """Whether a character belongs to a script without spaces (Chinese, Japanese, Thai, ...),
    including punctuation."""
    return unicodedata.east_asian_width(letter) in "WF" or "\u0e00" <= letter <= "\u109f"
