"""data=mix: read several datasets, hold out and weight their examples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dpo_cli.config import DataConfig
from dpo_cli.config.datasets import MixDataConfig
from dpo_cli.config.mix import sources_of
from dpo_cli.data.adapt import in_one_form
from dpo_cli.data.drops import DropReport
from dpo_cli.data.held_out import hold_out, note_fewer
from dpo_cli.data.part import Part, Splits, eval_count, for_tokenizer, part_of, read_part
from dpo_cli.data.trained import prompt_words
from dpo_cli.errors import ConfigError
from dpo_cli.records import PreferenceExample, response_text

Named = tuple[str, PreferenceExample]  # name of the source, example


@dataclass(frozen=True)
class Source:
    name: str
    share: float
    part: Part


def sources(config: MixDataConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[Source]:
    """The sources in the order of the configuration. ConfigError, DataError as `find_source`."""
    found = sources_of(config)
    return [
        Source(name, share, part_of(own if tokenizer is None else for_tokenizer(own, tokenizer)))
        for name, (own, share) in found.items()
    ]


def read_mix(config: MixDataConfig, seed: int, named: Sequence[Source]) -> Splits:
    """The examples of all sources. Pairs that occur twice are dropped, as are training rows whose
    prompt another source holds out; a source's share is taken after rows are held out."""
    drops = DropReport()
    train: list[Named] = []
    held: list[Named] = []
    for source in named:
        splits = read_part(source.part, seed)
        drops.absorb(splits.drops, f"{source.name}: ")
        train += [(source.name, example) for example in splits.train]
        held += [(source.name, example) for example in splits.eval]
    both = in_one_form([example for _, example in (*train, *held)])
    names = [name for name, _ in (*train, *held)]
    pairs = list(zip(names, both, strict=True))
    train, held = pairs[: len(train)], pairs[len(train) :]
    train = _distinct(train, {prompt_words(e.prompt) for _, e in held}, drops)
    if config.eval_rows:
        train, more = _hold_out(train, config, drops)
        held += more
    kept: list[PreferenceExample] = []
    for source in named:
        own = [example for name, example in train if name == source.name]
        chosen = _share(own, source, seed)
        kept += chosen
        count = sum(name == source.name for name, _ in held)
        drops.reading.append(
            f"{source.name}: {len(chosen):,} to train on (share {source.share:g} of {len(own):,}), "
            f"{count:,} held out"
        )
    revision = "+".join(filter(None, (source.part.train.revision for source in named))) or None
    return Splits(kept, [e for _, e in held], drops, " + ".join(s.name for s in named), revision)


def _distinct(rows: Sequence[Named], held_out: set[str], drops: DropReport) -> list[Named]:
    """Without repeated pairs, and without prompts that are held out."""
    seen: set[tuple[str, ...]] = set()
    kept: list[Named] = []
    for name, example in rows:
        words = prompt_words(example.prompt)
        content = (words, *map(response_text, example.responses))
        if words in held_out:
            drops.add(f"{name}: the prompt is held out", example.row)
        elif content in seen:
            drops.add(f"{name}: prompt and responses occur before", example.row)
        else:
            kept.append((name, example))
        seen.add(content)
    return kept


def _hold_out(
    rows: Sequence[Named], config: DataConfig, drops: DropReport
) -> tuple[list[Named], list[Named]]:
    """By the prompts' content, over all sources together."""
    count = eval_count(config, len(rows)) or 0
    if count >= len(rows):
        raise ConfigError(
            f"data.eval_rows={config.eval_rows} leaves no training rows of {len(rows):,}"
        )
    _, chosen = hold_out([example for _, example in rows], count, conversations=True)
    note_fewer(chosen, count, drops)
    taken = set(map(id, chosen))
    return (
        [row for row in rows if id(row[1]) not in taken],
        [row for row in rows if id(row[1]) in taken],
    )


def _share(
    examples: Sequence[PreferenceExample], source: Source, seed: int
) -> list[PreferenceExample]:
    """Each example as often as the share says; the rest is a seeded sample, in order."""
    whole, count = int(source.share), round(len(examples) * (source.share % 1))
    rng = random.Random(f"{seed} {source.name}")
    rest = sorted(rng.sample(range(len(examples)), count))
    return [*list(examples) * whole, *(examples[place] for place in rest)]
