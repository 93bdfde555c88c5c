"""Examples to token ids: one BOS, one shared prompt, EOS, and the length limits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_cli.config import DataConfig
from dpo_cli.data.chat import (
    ChatFormat,
    chat_format,
    chat_prompt,
    chat_row,
    completed_piece,
    plain_prompt,
    plain_response,
    special_pattern,
    token_id,
)
from dpo_cli.data.drops import BadRow, DropReport, response_name
from dpo_cli.data.notes import Ways, note_texts
from dpo_cli.data.template import Renderer
from dpo_cli.data.tokens import Ids, Piece, TokenizerFacts, encode_pieces, tokenizer_facts
from dpo_cli.data.trained import prompt_key
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.records import EncodedExample, PreferenceExample, Prompt, response_text

CHUNK = 1024  # examples a call of the tokenizer: enough for its threads, little memory
DEFAULT_MAX_LENGTH = 512  # tokens, as in the DPO reference code


@dataclass(frozen=True)
class Limits:
    """Tokens. max_length: prompt and response, with BOS and EOS. max_prompt_length: what
    is kept of the prompt of an example that is longer than max_length."""

    max_length: int
    max_prompt_length: int


def resolve_limits(config: DataConfig, model_context: int) -> Limits:
    """The configured limits, or min(512, context) and half of it; ConfigError if impossible."""
    length = config.max_length
    if length is None:
        length = min(DEFAULT_MAX_LENGTH, model_context)
    if length > model_context:
        raise ConfigError(
            f"data.max_length={length} is more than the model's context of {model_context} tokens: "
            f"set data.max_length={model_context} and data.max_prompt_length below it"
        )
    if length < 2:
        raise ConfigError(f"data.max_length={length}: a prompt and a response take 2 or more")
    prompt = config.max_prompt_length
    if prompt is None:
        prompt = length // 2
    if not 1 <= prompt < length:
        raise ConfigError(
            f"data.max_prompt_length={prompt}: give 1 to {length - 1}, "
            f"to leave room for a response within data.max_length={length}"
        )
    return Limits(length, prompt)


@dataclass(frozen=True)
class Encoder:
    """What encoding depends on besides the example. chat: None if no template is used. special:
    the texts of special tokens."""

    tokenizer: PreTrainedTokenizerBase
    facts: TokenizerFacts
    chat: ChatFormat | None
    limits: Limits
    keep_prompt: str
    special: re.Pattern[str]
    ways: Ways


@dataclass(frozen=True)
class Written:
    """An example as text pieces. end_ids: what follows each response: EOS last if it is
    complete, nothing if it was cut. sampled: by a policy, which may have written nothing."""

    example: PreferenceExample
    prompt: list[Piece]
    responses: list[list[Piece]]
    end_ids: list[tuple[int, ...]]
    sampled: bool = False


def encode_examples(
    examples: Sequence[PreferenceExample],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    limits: Limits,
    drops: DropReport,
) -> list[EncodedExample]:
    """Ids of every example that can be used, in order; the others go to `drops`.

    Prompt and responses are tokenised apart, so that all responses continue the same
    prompt ids, as sampled tokens do. A complete response ends with EOS; one that was cut,
    here or before it was `finished`, does not. An example longer than `max_length` has its
    prompt cut to `max_prompt_length` (BOS stays), then its responses to the room that is
    left, as in the DPO reference code.
    """
    chats = any(not isinstance(example.prompt, str) for example in examples)
    encoder = _make_encoder(tokenizer, config, limits, chats)
    return [
        encoded
        for first in range(0, len(examples), CHUNK)
        for encoded in _encode_chunk(examples[first : first + CHUNK], encoder, drops)
    ]


def encode_completed(
    rows: Sequence[tuple[Prompt, str, bool]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    limits: Limits,
    cuts: DropReport,
) -> list[EncodedExample]:
    """(prompt, completion, whether it ended by itself) -> ids, as `encode_examples` makes them.

    A completion that did not end has no EOS; an empty one is no error. Every row comes back,
    in order: DataError where that cannot be. What was cut is told to `cuts`.
    """
    encoder = _make_encoder(tokenizer, config, limits, any(not isinstance(r[0], str) for r in rows))
    examples = [
        PreferenceExample(prompt, (text,), row, finished=(finished,))
        for row, (prompt, text, finished) in enumerate(rows)
    ]
    try:
        written = [_write(example, encoder, sampled=True) for example in examples]
        table = _ids_of_pieces(written, encoder)
        return [_fit(w, table, encoder, cuts) for w in written]
    except BadRow as bad:
        raise DataError(f"a completion cannot be scored: {bad}") from bad


def _make_encoder(
    tokenizer: PreTrainedTokenizerBase, config: DataConfig, limits: Limits, chats: bool
) -> Encoder:
    """`chats`: whether any prompt is a list of messages."""
    facts = tokenizer_facts(tokenizer)
    plain = config.chat_template in ("never", "human_assistant")
    always = config.chat_template == "always"
    if chats and not plain and tokenizer.chat_template is None:
        raise ConfigError(
            "the rows are conversations and the tokenizer has no chat template: say how they are "
            "written with data.chat_template=human_assistant or data.chat_template=<a Jinja file>"
            f"{without_system(config)}"
        )
    wanted = always or (chats and not plain)
    chat = chat_format(tokenizer, facts, Renderer.of(tokenizer, config)) if wanted else None
    has_template = tokenizer.chat_template is not None and not plain
    ways = Ways(config.special_tokens == "parse", always, has_template)
    special = special_pattern(tokenizer)
    return Encoder(tokenizer, facts, chat, limits, config.keep_prompt, special, ways)


def without_system(config: DataConfig) -> str:
    """What else a user may do whose texts became conversations by a column beside them."""
    field = getattr(config, "system_field", None)
    read = f", or data.system_field=null if they are texts with a column {field!r} to leave out"
    return read if field else ""


def _encode_chunk(
    examples: Sequence[PreferenceExample], encoder: Encoder, drops: DropReport
) -> Iterator[EncodedExample]:
    written: list[Written] = []
    for example in examples:
        try:
            written.append(_write(example, encoder))
        except BadRow as bad:
            drops.add(str(bad), example.row)
            continue
        note_texts(example, encoder.special, encoder.ways, drops)
    table = _ids_of_pieces(written, encoder)
    for w in written:
        try:
            yield _fit(w, table, encoder, drops)
        except BadRow as bad:
            drops.add(str(bad), w.example.row)


def _ids_of_pieces(written: Sequence[Written], encoder: Encoder) -> dict[Piece, Ids | None]:
    pieces = (p for w in written for part in (w.prompt, *w.responses) for p in part)
    return encode_pieces(encoder.tokenizer, encoder.facts, pieces)


def _write(example: PreferenceExample, encoder: Encoder, sampled: bool = False) -> Written:
    prompt, chat = example.prompt, encoder.chat
    if chat is None or (isinstance(prompt, str) and not encoder.ways.templated):
        start, responses, ends = _write_plain(example, encoder)
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if sampled:
            start = chat_prompt(chat, messages)
            texts = map(response_text, example.responses)
            responses = [[completed_piece(chat, text)] for text in texts]
            ends = [chat.end_ids] * len(responses)
        else:
            found = chat_row(chat, messages, example.responses)
            start, responses, ends = found.prompt, found.responses, found.end_ids
    finished = example.finished or [True] * len(responses)
    kept = [end if f else () for end, f in zip(ends, finished, strict=True)]
    return Written(example, start, responses, kept, sampled)


def _write_plain(
    example: PreferenceExample, encoder: Encoder
) -> tuple[list[Piece], list[list[Piece]], list[tuple[int, ...]]]:
    """Texts as they are. Where special tokens are read as such, one that ends a response is its
    end: it is not written twice."""
    start, eos = plain_prompt(example.prompt), encoder.facts.eos
    pieces = [plain_response(example.prompt, response_text(r)) for r in example.responses]
    if not encoder.ways.parse:
        return [start], [[piece] for piece in pieces], [(eos,)] * len(pieces)
    texts: list[list[Piece]] = []
    ends: list[tuple[int, ...]] = []
    for piece in pieces:
        text, end = piece.text, eos
        bare = text.rstrip()
        last = next((m for m in encoder.special.finditer(bare) if m.end() == len(bare)), None)
        if last is not None:
            text = bare[: last.start()]
            end = token_id(encoder.tokenizer, last.group())
        texts.append([Piece(text, template=True)])
        ends.append((end,))
    return [start._replace(template=True)], texts, ends


def _fit(
    written: Written, table: Mapping[Piece, Ids | None], encoder: Encoder, drops: DropReport
) -> EncodedExample:
    """Join the pieces' ids and cut them to the limits; BadRow if they leave nothing to learn."""
    limits, row, facts = encoder.limits, written.example.row, encoder.facts
    prompt = _with_bos([i for piece in written.prompt for i in _ids(table, piece)], facts)
    texts = [[i for piece in part for i in _ids(table, piece)] for part in written.responses]
    for place, ids in enumerate(texts):
        if not (ids or written.sampled):
            raise BadRow("has no tokens", response_name(place, len(texts)))
        if facts.eos in ids:  # word-level and unigram models know special tokens as words
            raise BadRow(
                "has text that this tokenizer reads as EOS", response_name(place, len(texts))
            )
    ended = list(zip(texts, map(list, written.end_ids), strict=True))
    long_prompt = len(prompt) > limits.max_prompt_length
    longest = max(len(ids) + len(end) for ids, end in ended)
    if cut_prompt := long_prompt and len(prompt) + longest > limits.max_length:
        prompt = _shorten(prompt, limits.max_prompt_length, encoder.keep_prompt, facts)
    room = limits.max_length - len(prompt)
    responses = [ids + end if len(ids) + len(end) <= room else ids[:room] for ids, end in ended]
    cut_response = len(prompt) + longest > limits.max_length
    if len(set(map(tuple, responses))) < len(responses):
        when = " once cut to data.max_length" if cut_response else ""
        raise BadRow(f"have the same tokens{when}", "responses")
    if cut_prompt:
        drops.add_cut(f"prompt to {limits.max_prompt_length} tokens", row)
    if cut_response:
        drops.add_cut(f"response to fit {limits.max_length} tokens", row)
    return EncodedExample(
        np.array(prompt, np.int32),
        tuple(np.array(ids, np.int32) for ids in responses),
        row,
        written.example.scores,
        prompt_key(written.example.prompt),
        _as_json(written.example.prompt),
    )


def _as_json(prompt: Prompt) -> bytes:
    """Texts may hold lone surrogates, and messages whatever their file has beside the text."""
    text = json.dumps(prompt, ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogatepass")


def _ids(table: Mapping[Piece, Ids | None], piece: Piece) -> Ids:
    ids = table[piece]
    if ids is None:
        raise BadRow("cannot be told apart from the text before it by this tokenizer", "text")
    return ids


def _with_bos(ids: Ids, facts: TokenizerFacts) -> Ids:
    """Exactly one BOS where the tokenizer writes one (a chat template may have already)."""
    bos = list(facts.bos)
    if ids[: len(bos)] != bos:
        ids = bos + ids
    return ids or [facts.start]


def _shorten(ids: Ids, length: int, keep: str, facts: TokenizerFacts) -> Ids:
    """BOS and the first or last tokens of a prompt, `length` in all."""
    head = list(facts.bos)[:length]
    body, room = ids[len(facts.bos) :], length - len(head)
    return head + (body[:room] if keep == "start" else body[len(body) - room :])
