"""Hold out examples by their prompts, and notes on the held-out set."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from dpo_cli.data.drops import DropReport
from dpo_cli.data.trained import prompt_text, prompt_words
from dpo_cli.errors import ConfigError
from dpo_cli.records import PreferenceExample, Prompt

ENOUGH = 0.9  # of the examples to hold out; if fewer are, a note says so


def hold_out(
    examples: Sequence[PreferenceExample], count: int, conversations: bool = False
) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """(train, held out): at most `count` examples held out, no prompt on both sides.

    Prompts are held out in the order of a hash of their content, with all their examples, so the
    choice does not depend on the seed or the order of the file, and a larger count holds out more
    prompts in addition to the same ones. Prompts that differ only in whitespace count as one.
    conversations: prompts may be beginnings of each other; those with the same first message of
    the user count as one.
    """
    prompts = [_opening(e.prompt) if conversations else e.prompt for e in examples]
    groups: dict[str, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        groups[prompt_words(prompt)].append(place)
    held: set[int] = set()
    for group in sorted(groups.values(), key=lambda group: _place(prompts, group)):
        if len(held) + len(group) > count:
            break
        held.update(group)
    if count and not held:
        largest = max(map(len, groups.values()))
        raise ConfigError(
            f"data.eval_rows={count} is less than the number of examples of the first prompt: set "
            f"data.eval_rows={largest} or more"
        )
    train = [e for place, e in enumerate(examples) if place not in held]
    return train, [examples[place] for place in sorted(held)]


def _opening(prompt: Prompt) -> Prompt:
    """A conversation up to the user's first message."""
    if isinstance(prompt, str):
        return prompt
    users = (place for place, message in enumerate(prompt) if message["role"] == "user")
    return prompt[: next(users, len(prompt) - 1) + 1]


def _place(prompts: Sequence[Prompt], group: Sequence[int]) -> bytes:
    texts = {prompt_text(prompts[place]) for place in group}
    return min(hashlib.sha256(text.encode()).digest() for text in texts)


def note_fewer(held: Sequence[PreferenceExample], requested: int, drops: DropReport) -> None:
    """Note if far fewer examples are held out than requested, as prompts have many each."""
    if len(held) < ENOUGH * requested:
        drops.add_note(
            f"data.eval_rows={requested:,} holds out only {len(held):,} examples: the next prompt "
            "has too many",
            held[0].row,
        )


def note_overlap(
    train: Sequence[PreferenceExample], held: Sequence[PreferenceExample], drops: DropReport
) -> None:
    """Note eval rows, from a separate file, whose prompts are training prompts."""
    known = {prompt_words(example.prompt) for example in train}
    for example in held:
        if prompt_words(example.prompt) in known:
            drops.add_note("the prompt is also a training prompt", example.row)
