"""Load a dataset: read, adapt, hold out, encode, cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import dpo_cli
from dpo_cli.config import DataConfig, SentimentDataConfig
from dpo_cli.config.datasets import MixDataConfig
from dpo_cli.data import cache
from dpo_cli.data.drops import DropReport
from dpo_cli.data.encode import encode_examples
from dpo_cli.data.limits import Limits, resolve_limits
from dpo_cli.data.mix import read_mix, sources
from dpo_cli.data.part import (
    EVAL_PREFIX,
    Part,
    Splits,
    eval_count,
    for_tokenizer,
    part_of,
    read_part,
)
from dpo_cli.data.sources import Source, content_digest
from dpo_cli.data.template import use_template_file, writes_the_date
from dpo_cli.data.tokens import tokenizer_digest
from dpo_cli.errors import DataError
from dpo_cli.records import EncodedExample

GENERATED = "sentiment"  # the dataset that is generated rather than read


@dataclass(frozen=True)
class EncodedSplits:
    """Splits as token ids. fingerprint: sha256 over the ids of both, for resuming."""

    train: list[EncodedExample]
    eval: list[EncodedExample]
    drops: DropReport
    origin: str
    revision: str | None
    fingerprint: str
    limits: Limits


def load_splits(
    config: DataConfig, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> Splits:
    """Read, adapt and split the rows. The split depends on prompts' texts, not on token ids.

    tokenizer: the model's; its chat template may decide the form of the rows (`for_tokenizer`).
    Raises ConfigError or DataError; unusable rows are counted in `drops`.
    """
    if tokenizer is not None:
        config = for_tokenizer(config, tokenizer)
    if isinstance(config, MixDataConfig):
        return read_mix(config, seed, sources(config, tokenizer))
    if config.name == GENERATED:
        from dpo_cli.data.adapters.sentiment import generate

        assert isinstance(config, SentimentDataConfig)
        rows = config.rows if config.max_rows is None else min(config.rows, config.max_rows)
        config = dataclasses.replace(config, eval_rows=eval_count(config, rows))
        train, held = generate(config, seed)
        report = DropReport(read=len(train) + len(held))
        return Splits(train, held, report, "generated film reviews", None)
    return read_part(part_of(config), seed)


def load_encoded(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_context: int,
    seed: int,
    cache_dir: Path | None,
) -> EncodedSplits:
    """`load_splits` as token ids, cached in `cache_dir` for runs on the same rows.

    Sets the tokenizer's chat template if `data.chat_template` is a file.
    """
    limits = resolve_limits(config, model_context)
    use_template_file(tokenizer, config)
    config = for_tokenizer(config, tokenizer)
    if config.name == GENERATED:
        return _encode_splits(load_splits(config, seed), True, tokenizer, config, limits)
    parts, read = _reading(config, tokenizer, seed)
    sources = [source for part in parts for source in (part.train, part.eval)]
    path, contents = None, None
    if cache_dir is not None:
        contents = _contents(sources)
        key = _cache_key(config, tokenizer, limits, seed, contents)
        path = cache_dir / f"rows-{key[:24]}.safetensors"
        if (stored := cache.load(path)) is not None:
            return _from_cache(*stored)
    own_file = any(part.eval is not None for part in parts)
    encoded = _encode_splits(read(), own_file, tokenizer, config, limits)
    if path is not None and _still(contents, sources):
        cache.save(path, {"train": encoded.train, "eval": encoded.eval}, _cache_meta(encoded))
    return encoded


def fingerprint(examples: Sequence[EncodedExample]) -> str:
    """sha256 over the token ids and the rows' terms, in order."""
    total = hashlib.sha256()
    for example in examples:
        arrays = (example.prompt_ids, *example.response_ids)
        total.update(b"%d:" % len(arrays))
        for ids in arrays:
            total.update(b"%d," % len(ids) + ids.astype("<i4").tobytes())
        if example.terms:
            total.update(repr(example.terms).encode())
    return total.hexdigest()


def _reading(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[Part], Callable[[], Splits]]:
    """What there is to read, and a function that reads it."""
    if isinstance(config, MixDataConfig):
        named = sources(config, tokenizer)
        return [source.part for source in named], lambda: read_mix(config, seed, named)
    part = part_of(config)
    return [part], lambda: read_part(part, seed)


def _encode_splits(
    splits: Splits,
    eval_file: bool,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    limits: Limits,
) -> EncodedSplits:
    """eval_file: the eval rows have row numbers of a separate file."""
    drops, eval_drops = splits.drops, DropReport()
    train = encode_examples(splits.train, tokenizer, config, limits, drops)
    held = encode_examples(splits.eval, tokenizer, config, limits, eval_drops)
    drops.absorb(eval_drops, EVAL_PREFIX if eval_file else "")
    if not train:
        raise DataError(f"{splits.origin}: no row can be used: {'; '.join(drops.summary_lines())}")
    both = hashlib.sha256((fingerprint(train) + fingerprint(held)).encode()).hexdigest()
    return EncodedSplits(train, held, drops, splits.origin, splits.revision, both, limits)


def _contents(sources: Sequence[Source | None]) -> list[str | None]:
    return [content_digest(source) if source else None for source in sources]


def _still(contents: Sequence[str | None] | None, sources: Sequence[Source | None]) -> bool:
    """Whether the rows are those that were read: a file may be written to meanwhile."""
    try:
        return contents == _contents(sources)
    except DataError:
        return False


def _cache_key(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    seed: int,
    contents: Sequence[str | None],
) -> str:
    """sha256 of everything the ids depend on, including this package's code."""
    if not writes_the_date(tokenizer):
        config = dataclasses.replace(config, date=None)
    facts = [
        dpo_cli.__version__,
        _code_digest(),
        contents,
        dataclasses.asdict(config),
        dataclasses.asdict(limits),
        seed,
        tokenizer_digest(tokenizer),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _code_digest() -> str:
    """sha256 of the code of this folder, so that an edited adapter invalidates the cache."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


def _cache_meta(encoded: EncodedSplits) -> dict[str, object]:
    return {
        "drops": dataclasses.asdict(encoded.drops),
        "limits": dataclasses.asdict(encoded.limits),
        "origin": encoded.origin,
        "revision": encoded.revision,
        "fingerprint": encoded.fingerprint,
    }


def _from_cache(lists: dict[str, list[EncodedExample]], meta: dict[str, Any]) -> EncodedSplits:
    return EncodedSplits(
        train=lists["train"],
        eval=lists["eval"],
        drops=DropReport(**meta["drops"]),
        origin=meta["origin"],
        revision=meta["revision"],
        fingerprint=meta["fingerprint"],
        limits=Limits(**meta["limits"]),
    )
