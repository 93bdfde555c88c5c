"""Examples to token ids: BOS, the shared prompt, responses with EOS, and truncation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
from dpo_cli.data.cut import chunks, cut, size
from dpo_cli.data.drops import BadRow, DropReport, response_name
from dpo_cli.data.limits import Limits
from dpo_cli.data.notes import TextHandling, note_texts
from dpo_cli.data.template import Renderer
from dpo_cli.data.tokens import Ids, Piece, TokenizerFacts, encode_pieces, tokenizer_facts
from dpo_cli.data.trained import prompt_key
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.records import (
    EncodedExample,
    PreferenceExample,
    Prompt,
    most_characters,
    response_text,
)


@dataclass(frozen=True)
class Encoder:
    """What encoding depends on besides the example. chat: None if no template is used. special:
    matches special tokens."""

    tokenizer: PreTrainedTokenizerBase
    facts: TokenizerFacts
    chat: ChatFormat | None
    limits: Limits
    keep_prompt: str
    special: re.Pattern[str]
    handling: TextHandling


@dataclass(frozen=True)
class Written:
    """An example as text pieces. end_ids: tokens that end each response; empty if it is
    unfinished. sampled: by a policy, so that it may be empty. shortened: which texts were cut
    before they are tokenized, `prompt` and `response`."""

    example: PreferenceExample
    prompt: list[Piece]
    responses: list[list[Piece]]
    end_ids: list[tuple[int, ...]]
    sampled: bool = False
    shortened: tuple[str, ...] = ()


def encode_examples(
    examples: Sequence[PreferenceExample],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    limits: Limits,
    drops: DropReport,
) -> list[EncodedExample]:
    """Token ids of every usable example, in order; the others are counted in `drops`.

    Prompt and responses are tokenized separately, so that all responses continue the same prompt
    ids, as sampled tokens do. A complete response ends with EOS; a truncated or unfinished one does
    not. As in the DPO reference code, an example longer than `max_length` has its prompt truncated
    to `max_prompt_length` (keeping BOS), then its responses to what remains of `max_length`.
    """
    chats = any(not isinstance(example.prompt, str) for example in examples)
    encoder = _make_encoder(tokenizer, config, limits, chats)
    return [
        encoded for chunk in chunks(examples) for encoded in _encode_chunk(chunk, encoder, drops)
    ]


def encode_completed(
    rows: Sequence[tuple[Prompt, str, bool]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    limits: Limits,
    drops: DropReport,
) -> list[EncodedExample]:
    """(prompt, completion, finished) -> token ids, as by `encode_examples`.

    finished: False for a completion that ended by length, which gets no EOS. Completions may be
    empty. Every row is encoded, in order (DataError if one cannot be); truncation goes to `drops`.
    """
    encoder = _make_encoder(tokenizer, config, limits, any(not isinstance(r[0], str) for r in rows))
    examples = [
        PreferenceExample(prompt, (text,), row, finished=(finished,))
        for row, (prompt, text, finished) in enumerate(rows)
    ]
    try:
        written = [_write(example, encoder, sampled=True) for example in examples]
        table = _ids_of_pieces(written, encoder)
        return [_fit(w, table, encoder, drops) for w in written]
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
            "the rows are conversations and the tokenizer has no chat template: set "
            "data.chat_template=human_assistant or data.chat_template=<Jinja file>"
            f"{without_system(config)}"
        )
    templated = always or (chats and not plain)
    chat = chat_format(tokenizer, facts, Renderer.of(tokenizer, config)) if templated else None
    has_template = tokenizer.chat_template is not None and not plain
    handling = TextHandling(config.special_tokens == "parse", always, has_template)
    special = special_pattern(tokenizer)
    return Encoder(tokenizer, facts, chat, limits, config.keep_prompt, special, handling)


def without_system(config: DataConfig) -> str:
    """Remedy for texts that became conversations because of a system column."""
    field = getattr(config, "system_field", None)
    remedy = f", or data.system_field=null to use the texts without their column {field!r}"
    return remedy if field else ""


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
        note_texts(example, encoder.special, encoder.handling, drops)
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
    if chat is None or (isinstance(prompt, str) and not encoder.handling.templated):
        start, responses, ends = _write_plain(example, encoder)
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if sampled:
            start = chat_prompt(chat, messages)
            texts = map(response_text, example.responses)
            responses = [[completed_piece(chat, text)] for text in texts]
            ends = [chat.end_ids] * len(responses)
        else:
            rendered = chat_row(chat, messages, example.responses)
            start, responses, ends = rendered.prompt, rendered.responses, rendered.end_ids
    finished = example.finished or [True] * len(responses)
    ends = [end if f else () for end, f in zip(ends, finished, strict=True)]
    return _shortened(Written(example, start, responses, ends, sampled), encoder)


def _shortened(written: Written, encoder: Encoder) -> Written:
    """Without what is surely truncated: tokenized in full, a text takes a hundred times its own
    memory. A response that is cut does not end."""
    most = most_characters(encoder.limits.max_length)
    parts, shortened = (written.prompt, *written.responses), []
    if all(size(part) <= most for part in parts):
        return written
    prompt, responses, ends = written.prompt, list(written.responses), list(written.end_ids)
    if size(prompt) > most:
        prompt = cut(prompt, most, at_end=encoder.keep_prompt == "end")
        shortened.append("prompt")
    for place, response in enumerate(responses):
        if size(response) > most:
            responses[place], ends[place] = cut(response, most, at_end=False), ()
            shortened.append("response")
    return replace(
        written, prompt=prompt, responses=responses, end_ids=ends, shortened=tuple(shortened)
    )


def _write_plain(
    example: PreferenceExample, encoder: Encoder
) -> tuple[list[Piece], list[list[Piece]], list[tuple[int, ...]]]:
    """Texts verbatim. With data.special_tokens=parse, a special token at the end of a response is
    its end token, which is not added again."""
    start, eos = plain_prompt(example.prompt), encoder.facts.eos
    pieces = [plain_response(example.prompt, response_text(r)) for r in example.responses]
    if not encoder.handling.parse:
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
    """Join the pieces' ids and truncate them. BadRow if nothing to learn from is left."""
    limits, row, facts = encoder.limits, written.example.row, encoder.facts
    prompt = _with_bos([i for piece in written.prompt for i in _ids(table, piece)], facts)
    texts = [[i for piece in part for i in _ids(table, piece)] for part in written.responses]
    for place, ids in enumerate(texts):
        if not (ids or written.sampled):
            raise BadRow("has no tokens", response_name(place, len(texts)))
        if facts.eos in ids:  # word-level and unigram models have special tokens as words
            raise BadRow(
                "has text that this tokenizer reads as EOS", response_name(place, len(texts))
            )
    ended = list(zip(texts, map(list, written.end_ids), strict=True))
    long_prompt = len(prompt) > limits.max_prompt_length
    longest = max((len(ids) + len(end) for ids, end in ended), default=0)
    if truncated_prompt := long_prompt and len(prompt) + longest > limits.max_length:
        prompt = _shorten(prompt, limits.max_prompt_length, encoder.keep_prompt, facts)
    room = limits.max_length - len(prompt)
    responses = [ids + end if len(ids) + len(end) <= room else ids[:room] for ids, end in ended]
    truncated_response = len(prompt) + longest > limits.max_length
    if len(set(map(tuple, responses))) < len(responses):
        when = " once truncated to data.max_length" if truncated_response else ""
        raise BadRow(f"have the same tokens{when}", "responses")
    if truncated_prompt or "prompt" in written.shortened:
        drops.add_truncated(f"prompt (data.max_prompt_length={limits.max_prompt_length})", row)
    if truncated_response or "response" in written.shortened:
        drops.add_truncated(f"response (data.max_length={limits.max_length})", row)
    return EncodedExample(
        np.array(prompt, np.int32),
        tuple(np.array(ids, np.int32) for ids in responses),
        row,
        written.example.scores,
        prompt_key(written.example.prompt),
        _as_json(written.example.prompt),
        written.example.terms,
    )


def _as_json(prompt: Prompt) -> bytes:
    """Texts may contain lone surrogates, and messages values of any type beside the text."""
    text = json.dumps(prompt, ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogatepass")


def _ids(table: Mapping[Piece, Ids | None], piece: Piece) -> Ids:
    ids = table[piece]
    if ids is None:
        raise BadRow("is merged with the text before it by this tokenizer", "text")
    return ids


def _with_bos(ids: Ids, facts: TokenizerFacts) -> Ids:
    """Ids with exactly one BOS if the tokenizer adds one (a chat template may have already)."""
    bos = list(facts.bos)
    if ids[: len(bos)] != bos:
        ids = bos + ids
    return ids or [facts.start]


def _shorten(ids: Ids, length: int, keep: str, facts: TokenizerFacts) -> Ids:
    """A prompt truncated to `length` tokens: BOS and its first or last tokens."""
    head = list(facts.bos)[:length]
    body, room = ids[len(facts.bos) :], length - len(head)
    return head + (body[:room] if keep == "start" else body[len(body) - room :])
