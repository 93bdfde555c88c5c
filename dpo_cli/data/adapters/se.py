"""HuggingFaceH4/stack-exchange-preferences: a question and its answers, by votes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html.parser import HTMLParser
from itertools import combinations, islice
from typing import Any

from dpo_cli.config import SeDataConfig
from dpo_cli.data.adapters.columns import as_number, as_text, column, text
from dpo_cli.data.drops import BadRow
from dpo_cli.records import PreferenceExample

BLOCKS = {"p", "div", "blockquote", "ul", "ol", "pre", "hr", "table", "tr"} | {
    f"h{level}" for level in range(1, 7)
}
HIDDEN = {"script", "style"}


def parse(row: dict[str, Any], index: int, config: SeDataConfig) -> Iterable[PreferenceExample]:
    """Every pair of answers with different scores, best answers first.

    At most `max_pairs_per_prompt` pairs per question, if that is set.
    """
    prompt = f"\n\nHuman: {strip_html(text(row, 'question'), 'question')}\n\nAssistant:"
    answers = column(row, "answers")
    if not isinstance(answers, list):
        raise BadRow("is not a list", "answers")
    scored = sorted(map(_scored_answer, answers), key=lambda answer: -answer[0])
    pairs = [pair for pair in combinations(scored, 2) if pair[0][0] > pair[1][0]]
    if not pairs:
        raise BadRow("have no two different scores", "answers")
    for (won, better), (lost, worse) in islice(pairs, config.max_pairs_per_prompt):
        yield PreferenceExample(prompt, (f" {better}", f" {worse}"), index, (won, lost))


def _scored_answer(answer: Any) -> tuple[float, str]:
    if not isinstance(answer, dict):
        raise BadRow("contain something that is not an answer", "answers")
    score = as_number(answer.get("pm_score"), "answers.pm_score")
    return score, strip_html(as_text(answer.get("text"), "answers.text"), "answers.text")


def strip_html(source: str, field: str) -> str:
    """The text of HTML: paragraphs separated, code in backticks, entities decoded."""
    reader = _TextOfHtml()
    try:
        reader.feed(source)
        reader.close()
    except AssertionError as error:  # how html.parser reports a declaration it cannot read
        raise BadRow("is not readable HTML", field) from error
    return "".join(reader.parts).strip()


class _TextOfHtml(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.in_pre = False
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in HIDDEN
        if tag in BLOCKS:
            self.start_line(2)
        elif tag in {"li", "br"}:
            self.start_line(1)
        if tag == "pre" and not self.in_pre:
            self.in_pre = True
            self.parts.append("```\n")
        elif tag == "li":
            self.parts.append("- ")
        elif tag == "code" and not self.in_pre:
            self.parts.append("`")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in HIDDEN))
        if tag == "pre" and self.in_pre:
            self.in_pre = False
            self.start_line(1)
            self.parts.append("```")
        elif tag == "code" and not self.in_pre:
            self.parts.append("`")
        if tag in BLOCKS:
            self.start_line(2)

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        if not self.in_pre:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self.newlines() else data
        if data:
            self.parts.append(data)

    def start_line(self, newlines: int) -> None:
        """End the text so far with at least this many newlines."""
        missing = newlines - self.newlines()
        if missing > 0:
            self.parts.append("\n" * missing)

    def newlines(self) -> int:
        """Number of newlines that the text so far ends with; an empty text counts as two."""
        count = 0
        for part in reversed(self.parts):
            bare = part.rstrip("\n")
            count += len(part) - len(bare)
            if bare:
                return count
        return max(count, 2)
