"""Hold out examples by their prompts, and notes on the held-out set."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from dpo_cli.data.drops import DropReport
from dpo_cli.data.trained import prompt_text, prompt_words
from dpo_cli.errors import ConfigError
from dpo_cli.records import PreferenceExample

ENOUGH = 0.9  # of the examples to hold out; fewer are told


def hold_out(
    examples: Sequence[PreferenceExample], count: int
) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """(train, held out): at most `count` examples held out, no prompt on both sides.

    Prompts are taken in the order of a hash of their content, all examples of one together: no
    seed and no order of the file moves a prompt, and with another count more or fewer of the same
    are held out. Nor does a space or line break at its end; prompts of the same words are one.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for place, example in enumerate(examples):
        groups[prompt_words(example.prompt)].append(place)
    held: set[int] = set()
    for group in sorted(groups.values(), key=lambda group: _place(examples, group)):
        if len(held) + len(group) > count:
            break
        held.update(group)
    if count and not held:
        most = max(map(len, groups.values()))
        raise ConfigError(
            f"data.eval_rows={count} is fewer than the first prompt's examples: set "
            f"data.eval_rows={most} or more"
        )
    train = [e for place, e in enumerate(examples) if place not in held]
    return train, [examples[place] for place in sorted(held)]


def _place(examples: Sequence[PreferenceExample], group: Sequence[int]) -> bytes:
    texts = {prompt_text(examples[place].prompt) for place in group}
    return min(hashlib.sha256(text.encode()).digest() for text in texts)


def note_fewer(held: Sequence[PreferenceExample], asked: int, drops: DropReport) -> None:
    """Where prompts have many examples each, those of the next one may be far too many."""
    if len(held) < ENOUGH * asked:
        drops.add_note(
            f"data.eval_rows={asked:,} holds out only {len(held):,} examples: the next prompt has "
            "more than are left",
            held[0].row,
        )


def note_overlap(
    train: Sequence[PreferenceExample], held: Sequence[PreferenceExample], drops: DropReport
) -> None:
    """Of eval rows from a file of their own."""
    known = {prompt_words(example.prompt) for example in train}
    for example in held:
        if prompt_words(example.prompt) in known:
            drops.add_note("the prompt is also a training prompt", example.row)
