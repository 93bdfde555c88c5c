"""Truncation of texts by characters before tokenization, and batches of texts for the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dpo_cli.data.tokens import Piece
from dpo_cli.records import PreferenceExample, response_text

EXAMPLES = 1024  # per tokenizer call: enough for its threads, little memory
CHARACTERS = 2**22  # per call: a token takes some 700 bytes in it


def cut(pieces: Sequence[Piece], most: int, at_end: bool) -> list[Piece]:
    """The first `most` characters of a text, or with `at_end` the last."""
    remaining, parts = most, []
    for piece in reversed(pieces) if at_end else pieces:
        text = (
            piece.text[max(0, len(piece.text) - remaining) :] if at_end else piece.text[:remaining]
        )
        if len(text) < len(piece.text):
            piece = piece._replace(text=text, start=piece.start and not at_end)  # noqa: PLW2901
        if text:
            parts.append(piece)
        remaining -= len(text)
    return parts[::-1] if at_end else parts


def size(pieces: Sequence[Piece]) -> int:
    """Characters of a text."""
    return sum(len(piece.text) for piece in pieces)


def chunks(examples: Sequence[PreferenceExample]) -> Iterator[list[PreferenceExample]]:
    """Batches of examples in order, as large as the tokenizer's memory allows."""
    chunk: list[PreferenceExample] = []
    characters = 0
    for example in examples:
        chunk.append(example)
        characters += _characters(example)
        if len(chunk) == EXAMPLES or characters >= CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _characters(example: PreferenceExample) -> int:
    prompt = example.prompt
    prompt_texts = [prompt] if isinstance(prompt, str) else [str(m["content"]) for m in prompt]
    return sum(map(len, (*prompt_texts, *map(response_text, example.responses))))
