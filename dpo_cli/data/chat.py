"""Prompts and responses as text pieces: by the tokenizer's chat template, or plain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.drops import BadRow
from dpo_cli.data.tokens import Piece, TokenizerFacts, encode_pieces
from dpo_cli.errors import ConfigError
from dpo_cli.records import EncodedExample, Message

# Private-use characters: no template rewrites them and no real text holds this sequence.
ANSWER = "\ue0f3answer\ue0f4"


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template does around an assistant's text, found by rendering probes.

    gap: whitespace between the generation prompt and the text; the model generates it,
    so it belongs to the response. end_ids: what ends the turn, EOS last. trims: the
    template strips the text. special: the special tokens' texts.
    """

    gap: str
    end_ids: tuple[int, ...]
    trims: bool
    special: re.Pattern[str]


def chat_format(tokenizer: PreTrainedTokenizerBase, facts: TokenizerFacts) -> ChatFormat:
    """Raises ConfigError if there is no template, or it does not render an assistant's turn."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            "data.chat_template=always: the tokenizer has no chat template, "
            "set data.chat_template=never"
        )
    ask: list[Message] = [{"role": "user", "content": "a"}]
    answer: Message = {"role": "assistant", "content": f"  {ANSWER}  "}
    try:
        opened = _render(tokenizer, ask, add_generation_prompt=True)
        before, found, end = _render(tokenizer, [*ask, answer]).partition(ANSWER)
    except TemplateError as error:
        raise ConfigError(
            f"the chat template cannot be used ({error}): set data.chat_template=never"
        ) from error
    if not found:
        raise ConfigError(
            "the chat template leaves out the assistant's text: set data.chat_template=never"
        )
    trims = not (before.endswith("  ") and end.startswith("  "))
    if not trims:
        before, end = before[:-2], end[2:]
    gap = before[len(opened) :] if before.startswith(opened) else ""
    return ChatFormat(
        gap=gap if gap.isspace() else "",
        end_ids=_end_ids(tokenizer, facts, end),
        trims=trims,
        special=_special_pattern(tokenizer),
    )


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _end_ids(
    tokenizer: PreTrainedTokenizerBase, facts: TokenizerFacts, end: str
) -> tuple[int, ...]:
    """The template's end of a turn up to its EOS; an EOS is added where it has none."""
    whole, bare = (Piece(text, template=True) for text in (end, end.rstrip()))
    table = encode_pieces(tokenizer, facts, (whole, bare))
    ids = table[whole] or []
    if facts.eos in ids:
        return tuple(ids[: ids.index(facts.eos) + 1])
    return (*(table[bare] or []), facts.eos)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> str:
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, messages: Sequence[Message]
) -> list[Piece]:
    """The rendered conversation up to where the assistant's next text begins.

    One piece, tokenised as `apply_chat_template` does; where a message holds the text of
    a special token, the messages' contents become pieces of their own, read literally.
    """
    rendered = _prompt_text(tokenizer, chat, messages)
    contents = [m["content"] for m in messages]
    if not any(map(chat.special.search, contents)):
        return [Piece(rendered, template=True, start=True)]
    marks = [f"\ue0f3{place}\ue0f4" for place in range(len(messages))]
    hollow = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
    fixed = _prompt_text(tokenizer, chat, hollow)
    for texts in (contents, [c.strip() for c in contents]):
        filled = dict(zip(marks, texts, strict=True))
        parts = re.split("(\ue0f3\\d+\ue0f4)", fixed)
        if "".join(filled.get(part, part) for part in parts) == rendered:
            pieces = [Piece(filled.get(part, part), part not in filled) for part in parts]
            return [pieces[0]._replace(start=True), *pieces[1:]]
    raise BadRow("holds a special token in a message that the chat template rewrites", "prompt")


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, messages: Sequence[Message]
) -> str:
    """What stands before the assistant's answer, less the gap."""
    answer: Message = {"role": "assistant", "content": ANSWER}
    try:
        before, found, _ = _render(tokenizer, [*messages, answer]).rpartition(ANSWER)
    except TemplateError as error:
        raise BadRow(f"is refused by the chat template ({error})", "prompt") from error
    if not found:
        raise BadRow("makes the chat template leave out the answer", "prompt")
    return before.removesuffix(chat.gap)


def chat_response(chat: ChatFormat, text: str) -> Piece:
    return Piece(chat.gap + (text.strip() if chat.trims else text))


def plain_prompt(prompt: str | Sequence[Message]) -> Piece:
    """A text as it is; messages in the dialogue form of the DPO reference code."""
    if isinstance(prompt, str):
        return Piece(prompt, start=True)
    heads = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    turns = [heads.get(m["role"], f"\n\n{m['role']}: ") + m["content"] for m in prompt]
    return Piece("".join(turns) + "\n\nAssistant:", start=True)


def plain_response(prompt: str | Sequence[Message], text: str) -> Piece:
    """A text as it is; after `Assistant:`, one space."""
    spaced = isinstance(prompt, str) or text[:1].isspace()
    return Piece(text if spaced else f" {text}")


def is_chat(examples: Sequence[EncodedExample], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts went through a chat template: text alone never makes special tokens."""
    special = set(tokenizer.all_special_ids)
    return any(int(i) in special for e in examples[:1] for i in e.prompt_ids[1:])
