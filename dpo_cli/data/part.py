"""One dataset: where its rows are, and reading, adapting and holding them out."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dpo_cli.config import DataConfig
from dpo_cli.data.adapt import adapt, in_one_form
from dpo_cli.data.drops import DropReport
from dpo_cli.data.files import Most
from dpo_cli.data.held_out import hold_out, note_fewer, note_overlap
from dpo_cli.data.sources import Rows, Source, find_source, read_source
from dpo_cli.errors import ConfigError
from dpo_cli.records import PreferenceExample

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
class Part:
    """A dataset's configuration and its source. eval: a separate source of held-out rows."""

    config: DataConfig
    train: Source
    eval: Source | None


def part_of(config: DataConfig) -> Part:
    train = find_source(config, "train")
    assert train is not None
    return Part(config, train, find_source(config, "eval"))


def for_tokenizer(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DataConfig:
    """The adapter's settings for a tokenizer: HH dialogues become messages for a chat model, which
    in their own format would never end a turn."""
    if config.name != "hh" or config.chat_template != "auto" or tokenizer.chat_template is None:
        return config
    return dataclasses.replace(config, chat_template="always")


def read_part(part: Part, seed: int) -> Splits:
    """max_rows limits the training rows only; it does not change what is held out."""
    config, train, eval_source = part.config, part.train, part.eval
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
    count = eval_count(config, len(chosen))
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
    count = eval_count(config, limit) or 0
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


def eval_count(config: DataConfig, rows: int) -> int | None:
    """`data.eval_rows` as a number: below 1 it is a share of the rows."""
    count = config.eval_rows
    if count is None:
        return None
    return round(count * rows) if count < 1 else int(count)
