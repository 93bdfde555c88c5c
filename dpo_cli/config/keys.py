"""One key of the configuration: its default, its meaning, and the values it may have.

    beta: float = key(0.1, "strength of the pull towards the reference", bound=above(0))

The facts stand beside the field; checks, help, the reference page and the expansion of `~` in paths
read them here. Types are those of the annotation.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 10**9  # of a number that nothing bounds earlier: no count of rows or steps is larger
HUGE = 1e30  # of a factor on weights and gradients, which are float32
COLDEST, HOTTEST = 0.0001, 10_000  # temperatures of sampling

LOCAL, LOCAL_OR_HUB = "local", "local or hub"  # what a key's path names


@dataclass(frozen=True)
class Bound:
    """says: what help pages say of it. problem: what is wrong with a value, None if nothing is."""

    says: str
    problem: Callable[[Any], str | None]


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


def at_least(least: float, most: float = MOST) -> Bound:
    """Of a number, or of every number of a list."""

    def problem(value: float) -> str | None:
        if least <= value <= most:
            return None
        return f"must be at most {_shown(most)}" if value > most else f"must be at least {least}"

    return Bound(f"must be {_shown(least)} to {_shown(most)}", problem)


def above(least: float, most: float = MOST) -> Bound:
    def problem(value: float) -> str | None:
        if least < value <= most:
            return None
        return f"must be at most {_shown(most)}" if value > most else f"must be above {least}"

    return Bound(f"must be above {_shown(least)}, at most {_shown(most)}", problem)


def within(interval: str) -> Bound:
    """An interval as mathematicians write it, such as `[0, 0.5)`."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def problem(value: float) -> str | None:
        over = value > low if interval[0] == "(" else value >= low
        under = value < high if interval[-1] == ")" else value <= high
        return None if over and under else f"must be in {interval}"

    return Bound(f"must be in {interval}", problem)


def heat(greedy: bool = True) -> Bound:
    """Of sampling; greedy: 0 is one, too. Logits divided by less than the coldest overflow."""
    warm = at_least(COLDEST, HOTTEST)
    if not greedy:
        return warm
    says = warm.says.replace("must be", "must be 0 (greedy) or")
    return Bound(says, lambda value: None if value == 0 or not warm.problem(value) else says)


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def day() -> Bound:
    says = "must be a day such as 2026-01-31"

    def problem(text: str) -> str | None:
        try:
            datetime.date.fromisoformat(text)
        except ValueError:
            return says
        return None

    return Bound(says, problem)
