"""Chat templates: conversations rendered and split into pieces of prompt and response.

The prompt is the common prefix of the rendered conversation and the template's generation prompt,
so that a policy is sampled from the same prompt tokens as in training; the response is the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.drops import BadRow, response_name
from dpo_cli.data.hollow import hollow, leaves
from dpo_cli.data.template import REMEDY, TOOLS, Renderer
from dpo_cli.data.tokens import Piece, TokenizerFacts, encode_pieces, tokenizer_facts
from dpo_cli.errors import ConfigError
from dpo_cli.records import EncodedExample, Message, Prompt, Response

# Private-use characters: no template rewrites them and no real text contains this sequence.
ANSWER = "\ue0f3answer\ue0f4"
THINK = re.compile(r"<(?:think|thinking|reasoning)>")
CHECKED = ("content", "reasoning_content")  # keys whose texts a rendering must contain


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around an assistant's text, found by rendering a probe.

    opens: it supports a generation prompt. gap: whitespace before the text that the model
    generates. end: what it writes after the text; end_ids: the tokens of `end` that end the turn,
    the last of which stops sampling. trims: it strips the text. special: matches special tokens.
    """

    render: Renderer
    opens: bool
    gap: str
    end: str
    end_ids: tuple[int, ...]
    trims: bool
    special: re.Pattern[str]

    def has_special(self, texts: Sequence[str]) -> bool:
        return any(map(self.special.search, texts))


@dataclass(frozen=True)
class WrittenChat:
    """A rendered conversation: pieces of the prompt and of each response, and their end ids."""

    prompt: list[Piece]
    responses: list[list[Piece]]
    end_ids: list[tuple[int, ...]]


def chat_format(
    tokenizer: PreTrainedTokenizerBase, facts: TokenizerFacts, render: Renderer | None = None
) -> ChatFormat:
    """Probe the chat template. ConfigError if there is none or it drops the assistant's text."""
    if tokenizer.chat_template is None:
        raise ConfigError(f"the tokenizer has no chat template: {REMEDY}")
    render = render or Renderer(tokenizer)
    question: list[Message] = [{"role": "user", "content": "a"}]
    answer: Message = {"role": "assistant", "content": f"  {ANSWER}  "}
    try:
        prompt, opened = render(question), render(question, opened=True)
        before, marker, end = render([*question, answer]).partition(ANSWER)
    except TemplateError as error:
        raise ConfigError(f"the chat template cannot be used ({error}): {REMEDY}") from error
    if not marker:
        raise ConfigError(f"the chat template leaves out the assistant's text: {REMEDY}")
    trims = not (before.endswith("  ") and end.startswith("  "))
    if not trims:
        before, end = before[:-2], end[2:]
    gap = before[len(opened) :] if before.startswith(opened) else ""
    gap = gap if gap.isspace() else ""  # otherwise it is the header of the turn
    special = special_pattern(tokenizer)
    ids = _end_ids(tokenizer, facts, end)
    return ChatFormat(render, prompt != opened, gap, end, ids, trims, special)


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the text of any special token."""
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _end_ids(
    tokenizer: PreTrainedTokenizerBase, facts: TokenizerFacts, end: str
) -> tuple[int, ...]:
    """Ids of the template's end of turn up to EOS, or else up to its first special token, such as
    Gemma's `<end_of_turn>`; EOS is appended if it has neither."""
    complete, bare = (Piece(text, template=True) for text in (end, end.rstrip()))
    table = encode_pieces(tokenizer, facts, (complete, bare))
    ids = table[complete] or []
    if facts.eos in ids:
        return tuple(ids[: ids.index(facts.eos) + 1])
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    place = next((place for place, i in enumerate(ids) if i in special), None)
    if place is not None:
        return tuple(ids[: place + 1])
    return (*(table[bare] or []), facts.eos)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a turn in the tokenizer's template; None if it has no usable one."""
    try:
        return chat_format(tokenizer, tokenizer_facts(tokenizer)).end_ids[-1]
    except ConfigError:
        return None


def chat_prompt(chat: ChatFormat, messages: Sequence[Message]) -> list[Piece]:
    """The prompt's pieces when the answer is unknown: for sampling and completions."""
    rendered = _rendered(chat, messages, "prompt", opened=True)
    text = _joined(rendered)
    if not chat.opens:
        return _slice(rendered, 0, len(text.removesuffix(chat.gap)))
    try:
        probe = chat.render([*messages, {"role": "assistant", "content": ANSWER}])
    except TemplateError as error:
        raise BadRow(f"is rejected by the chat template ({error})", "prompt") from error
    return _slice(rendered, 0, _common(text, probe))


def chat_row(
    chat: ChatFormat, messages: Sequence[Message], answers: Sequence[Response]
) -> WrittenChat:
    """Prompt and responses of a row. Raises BadRow if the template drops or changes a text."""
    prompt = chat_prompt(chat, messages)
    head = _joined(prompt)
    renderings, ends = [], []
    for place, answer in enumerate(answers):
        field = response_name(place, len(answers))
        message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
        pieces = _rendered(chat, [*messages, message], field)
        _check_held(chat, messages, message, _joined(pieces), field)
        renderings.append(pieces)
        head = head[: _common(head, _joined(pieces))]
    _check_head(chat, messages, head)
    responses = []
    for place, pieces in enumerate(renderings):
        text = _joined(pieces)
        last, ids = _end_of(chat, text, response_name(place, len(answers)))
        responses.append(_slice(pieces, len(head), last))
        ends.append(ids)
    return WrittenChat(_slice(prompt, 0, len(head)), responses, ends)


def _end_of(chat: ChatFormat, text: str, field: str) -> tuple[int, tuple[int, ...]]:
    """Where the answer's text ends in the rendering, and the tokens that end its turn."""
    end = chat.end if text.endswith(chat.end) else chat.end.strip()
    if text.endswith(end):
        return len(text) - len(end), chat.end_ids
    bare = text.rstrip()  # such as a turn of tool calls, which may end differently
    ends = [m for m in chat.special.finditer(bare) if m.end() == len(bare)]
    if not ends:
        raise BadRow("does not end like other turns of the chat template", field)
    return ends[-1].start(), (token_id(chat.render.tokenizer, ends[-1].group()),)


def token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a special token."""
    return cast(int, tokenizer.convert_tokens_to_ids(text))


def _check_held(
    chat: ChatFormat, messages: Sequence[Message], answer: Message, text: str, field: str
) -> None:
    """BadRow if the rendering lacks a text, or opens a second think block."""
    for message, where in (*((m, "prompt") for m in messages), (answer, field)):
        past = where == "prompt" and message["role"] == "assistant"
        for key, leaf in _last_of_content(message) if past else leaves(message):
            if key in CHECKED and not _contains(text, leaf):
                raise BadRow(f"is rendered by the chat template without its {key}", where)
        if not _names_held(message.get("tool_calls"), text):
            raise BadRow("is rendered by the chat template without its tool_calls", where)
    if messages and not _names_held(messages[0].get(TOOLS), text):
        raise BadRow("are left out by the chat template", TOOLS)
    if answer.get("reasoning_content") or THINK.search(answer["content"]):
        try:
            prompt_text = chat.render(messages)
        except TemplateError as error:
            raise BadRow(f"is rejected by the chat template ({error})", "prompt") from error
        if len(THINK.findall(text)) - len(THINK.findall(prompt_text)) > 1:
            raise BadRow("has a think block in addition to that of the chat template", field)


def _last_of_content(message: Message) -> list[tuple[str, str]]:
    """The last text of an earlier answer, whose reasoning many templates leave out."""
    return [leaf for leaf in leaves(message) if leaf[0] == "content"][-1:]


def _names_held(functions: Sequence[Message] | None, text: str) -> bool:
    """Whether a rendering has every function's name (arguments may be reformatted as JSON)."""
    names = [str(f.get("function", f).get("name", "")) for f in functions or ()]
    return all(_contains(text, name) for name in names)


def _check_head(chat: ChatFormat, messages: Sequence[Message], head: str) -> None:
    """BadRow if the template renders the prompt differently once it is answered."""
    last = messages[-1]["content"] if messages else ""
    if not _contains(head, last):
        raise BadRow("is rendered differently once an answer follows", "prompt")


def _contains(text: str, part: str) -> bool:
    """Whether a rendering contains a text, ignoring whitespace that templates change."""
    return part in text or _without_spaces(part) in _without_spaces(text)


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _rendered(
    chat: ChatFormat, messages: Sequence[Message], field: str, opened: bool = False
) -> list[Piece]:
    """A rendering as pieces: normally one, tokenized as by `apply_chat_template`. If a message
    contains the text of a special token, its texts become pieces that are read literally."""
    render: Callable[[Sequence[Message]], str] = lambda m: _head(chat, m, opened)  # noqa: E731
    try:
        text = render(messages)
        if not chat.has_special([leaf for m in messages for _, leaf in leaves(m)]):
            return [Piece(text, template=True)]
        marked, texts = hollow(messages)
        fixed = render(marked)
    except TemplateError as error:
        raise BadRow(f"is rejected by the chat template ({error})", field) from error
    parts = re.split("(\ue0f3\\d+\ue0f4)", fixed)
    pieces = [Piece(texts.get(part, part), part not in texts) for part in parts if part]
    if _joined(pieces) != text:
        raise BadRow("has a special token in a message that the chat template rewrites", field)
    return pieces


def _head(chat: ChatFormat, messages: Sequence[Message], opened: bool) -> str:
    """The rendered conversation; opened: up to where the assistant's next text begins."""
    if not opened or chat.opens:
        return chat.render(messages, opened)
    answer: Message = {"role": "assistant", "content": ANSWER}
    before, marker, _ = chat.render([*messages, answer]).rpartition(ANSWER)
    if not marker:
        raise BadRow("makes the chat template leave out the answer", "prompt")
    return before


def _joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _common(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def _slice(pieces: Sequence[Piece], first: int, last: int) -> list[Piece]:
    """The pieces of the joined text's characters [first, last)."""
    parts: list[Piece] = []
    place = 0
    for piece in pieces:
        text = piece.text[max(0, first - place) : max(0, last - place)]
        place += len(piece.text)
        if text:
            parts.append(Piece(text, piece.template, start=first == 0 and not parts))
    return parts


def completed_piece(chat: ChatFormat, text: str) -> Piece:
    """A completion after `chat_prompt`. The gap is added unless the text (sampled) has it."""
    text = text.strip() if chat.trims else text
    return Piece(text if chat.gap and text.startswith(chat.gap) else chat.gap + text)


def plain_prompt(prompt: Prompt) -> Piece:
    """A text verbatim; messages in the dialogue format of the DPO reference code."""
    if isinstance(prompt, str):
        return Piece(prompt, start=True)
    heads = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    turns = [heads.get(m["role"], f"\n\n{m['role']}: ") + m["content"] for m in prompt]
    return Piece("".join(turns) + "\n\nAssistant:", start=True)


def plain_response(prompt: Prompt, text: str) -> Piece:
    """A text verbatim; after `Assistant:` it starts with a space."""
    spaced = isinstance(prompt, str) or text[:1].isspace()
    return Piece(text if spaced else f" {text}")


def is_chat(examples: Sequence[EncodedExample], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts were rendered by a chat template: only those contain special tokens."""
    special = set(tokenizer.all_special_ids)
    return any(int(i) in special for e in examples[:1] for i in e.prompt_ids[1:])
