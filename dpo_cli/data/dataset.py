"""Load a dataset: read, adapt, hold out, encode, cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import dpo_cli
from dpo_cli.config import DataConfig, SentimentDataConfig
from dpo_cli.data import cache
from dpo_cli.data.adapt import adapt, in_one_form
from dpo_cli.data.drops import DropReport
from dpo_cli.data.encode import encode_examples
from dpo_cli.data.files import Most
from dpo_cli.data.held_out import hold_out, note_fewer, note_overlap
from dpo_cli.data.limits import Limits, resolve_limits
from dpo_cli.data.sources import Rows, Source, content_digest, find_source, read_source
from dpo_cli.data.template import use_template_file, writes_the_date
from dpo_cli.data.tokens import tokenizer_digest
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.records import EncodedExample, PreferenceExample

GENERATED = "sentiment"  # the dataset that is generated rather than read
EVAL_PREFIX = "eval split: "  # of messages about rows of a separate eval split


@dataclass(frozen=True)
class Splits:
    """Examples in source order. origin: name of the source, for messages; revision: hub commit."""

    train: list[PreferenceExample]
    eval: list[PreferenceExample]
    drops: DropReport
    origin: str
    revision: str | None


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
    if config.name == GENERATED:
        from dpo_cli.data.adapters.sentiment import generate

        assert isinstance(config, SentimentDataConfig)
        rows = config.rows if config.max_rows is None else min(config.rows, config.max_rows)
        config = dataclasses.replace(config, eval_rows=_eval_count(config, rows))
        train, held = generate(config, seed)
        report = DropReport(read=len(train) + len(held))
        return Splits(train, held, report, "generated film reviews", None)
    return _read_splits(config, seed, _train_source(config), find_source(config, "eval"))


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
    sources = _train_source(config), find_source(config, "eval")
    path, contents = None, None
    if cache_dir is not None:
        contents = _contents(sources)
        key = _cache_key(config, tokenizer, limits, seed, contents)
        path = cache_dir / f"rows-{key[:24]}.safetensors"
        if (stored := cache.load(path)) is not None:
            return _from_cache(*stored)
    splits = _read_splits(config, seed, *sources)
    encoded = _encode_splits(splits, sources[1] is not None, tokenizer, config, limits)
    if path is not None and _still(contents, sources):
        cache.save(path, {"train": encoded.train, "eval": encoded.eval}, _cache_meta(encoded))
    return encoded


def for_tokenizer(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DataConfig:
    """The adapter's settings for a tokenizer: HH dialogues become messages for a chat model, which
    in their own format would never end a turn."""
    if config.name != "hh" or config.chat_template != "auto" or tokenizer.chat_template is None:
        return config
    return dataclasses.replace(config, chat_template="always")


def fingerprint(examples: Sequence[EncodedExample]) -> str:
    """sha256 over the token ids, in order."""
    total = hashlib.sha256()
    for example in examples:
        arrays = (example.prompt_ids, *example.response_ids)
        total.update(b"%d:" % len(arrays))
        for ids in arrays:
            total.update(b"%d," % len(ids) + ids.astype("<i4").tobytes())
    return total.hexdigest()


def _train_source(config: DataConfig) -> Source:
    source = find_source(config, "train")
    assert source is not None
    return source


def _read_splits(
    config: DataConfig, seed: int, train: Source, eval_source: Source | None
) -> Splits:
    """max_rows limits the training rows only; it does not change what is held out."""
    drops = DropReport()
    most = Most.of(config)
    rows = read_source(train, most)
    if eval_source is None and config.eval_rows:
        remaining, chosen = _hold_out_of(rows, config, seed, drops)
        return Splits(remaining, chosen, drops, train.origin, train.revision)
    examples = adapt(rows, config, seed, drops)
    if eval_source is None:
        return Splits(examples, [], drops, train.origin, train.revision)
    eval_drops = DropReport()
    chosen = adapt(read_source(eval_source, most), config, seed, eval_drops)
    both, trained = in_one_form([*examples, *chosen]), len(examples)
    examples, chosen = both[:trained], both[trained:]
    count = _eval_count(config, len(chosen))
    if count is not None and count < len(chosen):
        _, chosen = hold_out(chosen, count, _by_turn(config))
        note_fewer(chosen, count, eval_drops)
    note_overlap(examples, chosen, eval_drops)
    drops.absorb(eval_drops, EVAL_PREFIX)
    return Splits(examples, chosen, drops, train.origin, train.revision)


def _hold_out_of(
    rows: Rows, config: DataConfig, seed: int, drops: DropReport
) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    examples = adapt(rows, dataclasses.replace(config, max_rows=None), seed, drops)
    limit = len(examples) if config.max_rows is None else min(config.max_rows, len(examples))
    count = _eval_count(config, limit) or 0
    if count >= limit:
        raise ConfigError(
            f"data.eval_rows={config.eval_rows} leaves no training rows: {rows.origin} has "
            f"{limit:,} that can be used"
        )
    remaining, chosen = hold_out(examples, count, _by_turn(config))
    note_fewer(chosen, count, drops)
    room = limit - len(chosen)
    if room < len(remaining):
        picked = sorted(random.Random(seed).sample(range(len(remaining)), room))
        remaining = [remaining[place] for place in picked]
    return remaining, chosen


def _by_turn(config: DataConfig) -> bool:
    """Whether a conversation may give several examples."""
    return getattr(config, "turns", "last") == "all"


def _eval_count(config: DataConfig, rows: int) -> int | None:
    """`data.eval_rows` as a number: below 1 it is a share of the rows."""
    count = config.eval_rows
    if count is None:
        return None
    return round(count * rows) if count < 1 else int(count)


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
