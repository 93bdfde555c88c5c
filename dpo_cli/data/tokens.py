"""Tokenize texts in pieces whose ids can be concatenated as if they were one text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dpo_cli.errors import ConfigError

Ids = list[int]

# Texts put before a continuation while it is tokenized. Several, as a tokenizer may merge one of
# them with the continuation's first characters.
ANCHORS = ("\n", "a", "1", ".", "文")


class Piece(NamedTuple):
    """A text and how it is tokenized.

    template: written by a chat template, so special tokens are parsed; elsewhere `</s>` is four
    characters. start: it begins the text rather than continuing one.
    """

    text: str
    template: bool = False
    start: bool = False


@dataclass(frozen=True)
class TokenizerFacts:
    """What a tokenizer adds to a text, found by probing it.

    bos: ids before a text (often none). eos: ends a response. start: replaces an empty prompt, as
    the first response token needs a predecessor. dummy_prefix: it puts a space before a text
    (sentencepiece), which a continuation must not get.
    """

    bos: tuple[int, ...]
    eos: int
    start: int
    dummy_prefix: bool


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token to end responses with: set one")
    bare, full = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    bos = tuple(full[: _index_of(full, bare)])
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    anchored = _after_anchor(tokenizer, ANCHORS[0], ["a"], False)[0]
    return TokenizerFacts(bos, tokenizer.eos_token_id, bos[-1] if bos else start, anchored != bare)


def _index_of(ids: Ids, part: Ids) -> int:
    places = range(len(ids) - len(part) + 1)
    return next((i for i in places if ids[i : i + len(part)] == part), 0)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what a tokenizer's ids depend on: model, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for transient in ("truncation", "padding"):  # set by the last call
        model.pop(transient, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    facts = [type(tokenizer).__name__, model, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, facts: TokenizerFacts, pieces: Iterable[Piece]
) -> dict[Piece, Ids | None]:
    """Ids of each distinct piece, without BOS or EOS, in at most four calls of the tokenizer.

    None: the tokenizer merges the piece with the text before it.
    """
    table: dict[Piece, Ids | None] = {}
    distinct = list(dict.fromkeys(pieces))
    for template in (False, True):
        for start in (False, True):
            group = [p for p in distinct if p.template == template and p.start == start]
            texts = [p.text for p in group]
            anchored = facts.dummy_prefix and not start
            encode = _continue_texts if anchored else _encode
            table.update(zip(group, encode(tokenizer, texts, template), strict=True))
    return table


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], template: bool) -> list[Ids]:
    if not texts:  # the tokenizer rejects an empty batch
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not template,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    ).input_ids


def _continue_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], template: bool
) -> list[Ids | None]:
    """Ids of texts that continue another text, without sentencepiece's dummy prefix."""
    results: list[Ids | None] = [None] * len(texts)
    for anchor in ANCHORS:
        left = [i for i, ids in enumerate(results) if ids is None]
        tails = _after_anchor(tokenizer, anchor, [texts[i] for i in left], template)
        for i, tail in zip(left, tails, strict=True):
            results[i] = tail
    return results


def _after_anchor(
    tokenizer: PreTrainedTokenizerBase, anchor: str, texts: Sequence[str], template: bool
) -> list[Ids | None]:
    """Ids of `anchor + text` without the anchor's; None if they do not begin with those."""
    head = _encode(tokenizer, [anchor], template)[0]
    both = _encode(tokenizer, [anchor + text for text in texts], template)
    return [ids[len(head) :] if ids[: len(head)] == head else None for ids in both]
