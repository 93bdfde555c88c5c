"""One key of the configuration: its default, its meaning, and the values it may have.

    beta: float = key(0.1, "strength of the pull towards the reference", bound=above(0))

The facts stand beside the field; checks, help, the reference page and the expansion of `~` in paths
read them here. Types are those of the annotation.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Bound = tuple[str, Callable[[Any], bool]]  # what a message says, and whether a value obeys

LOCAL, LOCAL_OR_HUB = "local", "local or hub"  # what a key's path names


@dataclass(frozen=True)
class Fact:
    """What is known of a key, beside its type and default."""

    meaning: str = ""  # one line, in words of the user
    choices: tuple[str, ...] = ()  # the only values; (): any of the type
    bound: Bound | None = None
    path: str | None = (
        None  # LOCAL: must exist | LOCAL_OR_HUB: a folder or a hub id | None: no path
    )
    old: str | None = None  # the key's name in earlier versions
    code: bool = False  # it has foreign code run: only the command line may say so


def key(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[str] = (),
    bound: Bound | None = None,
    path: str | None = None,
    old: str | None = None,
    code: bool = False,
) -> Any:
    """A dataclass field with its facts; a list or dict as default is copied for each instance."""
    fact = Fact(meaning, tuple(choices), bound, path, old, code)
    metadata = {"fact": fact}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def facts(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Fact]]:
    """(dotted key, value, facts) of every key of a configuration: its own, then those of groups."""
    groups = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            groups.append((value, f"{prefix}{field.name}."))
        else:
            yield f"{prefix}{field.name}", value, field.metadata.get("fact", Fact())
    for value, inner in groups:
        yield from facts(value, inner)


def at_least(least: float) -> Bound:
    return f"must be at least {least}", lambda value: least <= value < math.inf


def above(least: float) -> Bound:
    return f"must be above {least}", lambda value: least < value < math.inf


def within(interval: str) -> Bound:
    """An interval as mathematicians write it, such as `[0, 0.5)`."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def inside(value: float) -> bool:
        over = value > low if interval[0] == "(" else value >= low
        return over and (value < high if interval[-1] == ")" else value <= high)

    return f"must be in {interval}", inside


def day() -> Bound:
    def is_day(text: str) -> bool:
        try:
            datetime.date.fromisoformat(text)
        except ValueError:
            return False
        return True

    return "must be a day such as 2026-01-31", is_day
