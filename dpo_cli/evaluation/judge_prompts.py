"""The DPO paper's prompts to a language model as judge, and parsing of its answers.

Prompts: arXiv 2305.18290 appendix C.2, for summaries its prompt (C). Completions and answers are
untrusted: an answer is only searched for a letter.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from dpo_cli.escapes import CONTROLS
from dpo_cli.records import Prompt

Letter = Literal["A", "B"]

SUMMARY = """\
Which of the following summaries does a better job of summarizing the most important points in \
the given forum post, without including unimportant or irrelevant details? A good summary is both \
precise and concise.

Post:
{prompt}

Summary A:
{a}

Summary B:
{b}

FIRST provide a one-sentence comparison of the two summaries, explaining which you prefer and why. \
SECOND, on a new line, state only "A" or "B" to indicate your choice. Your response should use the \
format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">"""

DIALOGUE = """\
For the following query to a chatbot, which response is more helpful?

Query: {prompt}

Response A:
{a}

Response B:
{b}

FIRST provide a one-sentence comparison of the two responses and explain which you feel is more \
helpful. SECOND, on a new line, state only "A" or "B" to indicate which response is more helpful. \
Your response should use the format:
Comparison: <one-sentence comparison and explanation>
More helpful: <"A" or "B">"""

SENTIMENT = """\
Which of the following continuations of the given film review is more positive about the film?

Review: {prompt}

Continuation A:
{a}

Continuation B:
{b}

FIRST provide a one-sentence comparison of the two continuations, explaining which is more \
positive and why. SECOND, on a new line, state only "A" or "B" to indicate your choice. Your \
response should use the format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">"""

TEMPLATES = {"summary": SUMMARY, "dialogue": DIALOGUE, "sentiment": SENTIMENT}


def question(task: str, prompt: Prompt, a: str, b: str) -> str:
    """The message to the judge; `a` and `b` are completions of `prompt`.

    Longer texts are truncated to MAX_SHOWN characters: a prompt's last, a completion's first.
    """
    shown = readable(prompt)[-MAX_SHOWN:]
    return TEMPLATES[task].format(prompt=shown, a=a.strip()[:MAX_SHOWN], b=b.strip()[:MAX_SHOWN])


def readable(prompt: Prompt) -> str:
    """A prompt without the markers of the next turn; a single turn without its role."""
    if not isinstance(prompt, str):
        if len(prompt) == 1:
            return prompt[0]["content"].strip()
        return "\n\n".join(f"{m['role'].capitalize()}: {m['content'].strip()}" for m in prompt)
    text = prompt.strip().removesuffix("Assistant:").removesuffix("TL;DR:").strip()
    if text.startswith("Human:") and text.count("\n\nHuman:") + text.count("\n\nAssistant:") == 0:
        return text.removeprefix("Human:").strip()
    return text


NAMES = ("preferred", "more_helpful", "choice", "winner")
# Whitespace, quotes, markdown and brackets around words.
_MARKUP = r"[\s*_`\"'\u2018-\u201d<>()\[\]{}#-]*"
_NOUN = rf"{_MARKUP}(?:(?:summary|response|continuation)\b)?{_MARKUP}"
_LINE = re.compile(  # the line's last such label; the sentence may precede it
    rf"(?:.*\W)?(?:preferred|more[ _-]helpful|choice|winner){_NOUN}:(.*)", flags=re.IGNORECASE
)
_LETTER = re.compile(rf"{_NOUN}([AB]){_MARKUP}\.?{_MARKUP}", flags=re.IGNORECASE)
_FENCED = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", flags=re.DOTALL)
_ESCAPES = re.compile("\x1b\\[[0-9;?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?")
MAX_SHOWN = 2**17  # characters of a prompt and of each completion
MAX_ANSWER = 8000  # characters at an answer's end that are parsed
MAX_CHOICE = 60  # characters of a text with the letter


def plain(text: str) -> str:
    """Text without terminal escapes, control characters and bidirectional marks."""
    return CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")))


def parse_choice(answer: str) -> Letter | None:
    """The letter that an answer chooses; None if that is neither, both or unclear.

    Parsed from a JSON object with one of `NAMES` as a key, else from the last line `Preferred: A`
    or `More helpful: B` (an answer may first quote such lines of a completion), else from a last
    line that is only the letter.
    """
    text = plain(answer[-MAX_ANSWER:]).strip()
    fenced = _FENCED.fullmatch(text)
    object = _json_object(fenced[1] if fenced else text)
    if object is not None:
        values = {k.lower().replace(" ", "_"): v for k, v in object.items()}
        letters = {_letter(values[name]) for name in NAMES if name in values}
        return letters.pop() if len(letters) == 1 else None
    lines = text.splitlines()
    for line in reversed(lines):
        if match := _LINE.fullmatch(line):
            return _letter(match[1])
    return _letter(lines[-1]) if lines and lines[-1].strip(" \t*\"'.") in ("A", "B") else None


def _letter(value: Any) -> Letter | None:
    """The letter in `A`, `"b".`, `**Summary A**`; None in `A or B`."""
    short = isinstance(value, str) and len(value) <= MAX_CHOICE
    match = _LETTER.fullmatch(value) if short else None
    if match is None:
        return None
    return "A" if match[1].upper() == "A" else "B"


def _json_object(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # deep nesting exhausts the decoder's stack
        return None
    return value if isinstance(value, dict) else None
