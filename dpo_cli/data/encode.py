"""Examples to token ids: one BOS, one shared prompt, EOS, and the length limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_cli.config import DataConfig
from dpo_cli.data.chat import (
    ChatFormat,
    chat_format,
    chat_prompt,
    chat_response,
    plain_prompt,
    plain_response,
)
from dpo_cli.data.drops import BadRow, DropReport, response_name
from dpo_cli.data.tokens import Ids, Piece, TokenizerFacts, encode_pieces, tokenizer_facts
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.records import EncodedExample, PreferenceExample, Prompt

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
    """What encoding depends on besides the example. chat: None if no template is used."""

    tokenizer: PreTrainedTokenizerBase
    facts: TokenizerFacts
    chat: ChatFormat | None
    chat_always: bool
    limits: Limits
    keep_prompt: str


@dataclass(frozen=True)
class Written:
    """An example as text pieces. end_ids: what follows each response: EOS last if it is
    complete, nothing if it was cut. sampled: by a policy, which may have written nothing."""

    example: PreferenceExample
    prompt: list[Piece]
    responses: list[Piece]
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
        pieces = (piece for w in written for piece in (*w.prompt, *w.responses))
        table = encode_pieces(encoder.tokenizer, encoder.facts, pieces)
        return [_fit(w, table, encoder, cuts) for w in written]
    except BadRow as bad:
        raise DataError(f"a completion cannot be scored: {bad}") from bad


def _make_encoder(
    tokenizer: PreTrainedTokenizerBase, config: DataConfig, limits: Limits, chats: bool
) -> Encoder:
    """`chats`: whether any prompt is a list of messages."""
    facts = tokenizer_facts(tokenizer)
    always = config.chat_template == "always"
    auto = config.chat_template == "auto" and chats and tokenizer.chat_template is not None
    chat = chat_format(tokenizer, facts) if always or auto else None
    return Encoder(tokenizer, facts, chat, always, limits, config.keep_prompt)


def _encode_chunk(
    examples: Sequence[PreferenceExample], encoder: Encoder, drops: DropReport
) -> Iterator[EncodedExample]:
    written: list[Written] = []
    for example in examples:
        try:
            written.append(_write(example, encoder))
        except BadRow as bad:
            drops.add(str(bad), example.row)
    pieces = (piece for w in written for piece in (*w.prompt, *w.responses))
    table = encode_pieces(encoder.tokenizer, encoder.facts, pieces)
    for w in written:
        try:
            yield _fit(w, table, encoder, drops)
        except BadRow as bad:
            drops.add(str(bad), w.example.row)


def _write(example: PreferenceExample, encoder: Encoder, sampled: bool = False) -> Written:
    prompt, chat = example.prompt, encoder.chat
    end: tuple[int, ...] = (encoder.facts.eos,)
    if chat is None or (isinstance(prompt, str) and not encoder.chat_always):
        start = [plain_prompt(prompt)]
        responses = [plain_response(prompt, text) for text in example.responses]
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        start, end = chat_prompt(encoder.tokenizer, chat, messages), chat.end_ids
        responses = [chat_response(chat, text) for text in example.responses]
    finished = example.finished or [True] * len(responses)
    return Written(example, start, responses, [end if f else () for f in finished], sampled)


def _fit(
    written: Written, table: Mapping[Piece, Ids | None], encoder: Encoder, drops: DropReport
) -> EncodedExample:
    """Join the pieces' ids and cut them to the limits; BadRow if they leave nothing to learn."""
    limits, row, facts = encoder.limits, written.example.row, encoder.facts
    prompt = _with_bos([i for piece in written.prompt for i in _ids(table, piece)], facts)
    texts = [_ids(table, piece) for piece in written.responses]
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
    )


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
