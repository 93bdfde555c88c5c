"""One key of the configuration: its default, meaning and allowed values.

    beta: float = key(0.1, "strength of the KL penalty towards the reference", bound=above(0))

These facts are field metadata, which checks, help and the expansion of `~` in paths read. The type
is the field's annotation.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 10**9  # default upper bound of numbers: no count of rows or steps is larger
HUGE = 1e30  # upper bound of factors on weights and gradients, which are float32
COLDEST, HOTTEST = 0.0001, 10_000  # sampling temperatures

LOCAL, LOCAL_OR_HUB = "local", "local or hub"  # kinds of paths


@dataclass(frozen=True)
class Bound:
    """says: its text in help pages. problem: what is wrong with a value, None if nothing is."""

    says: str
    problem: Callable[[Any], str | None]


@dataclass(frozen=True)
class Fact:
    """The facts of a key, besides its type and default."""

    meaning: str = ""  # one line, for the user
    choices: tuple[str, ...] = ()  # the allowed values; (): any of the type
    bound: Bound | None = None
    path: str | None = None  # LOCAL: must exist | LOCAL_OR_HUB: folder or hub id | None: no path
    old: str | None = None  # the key's name in earlier versions
    code: bool = False  # it runs foreign code: settable on the command line only


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
    """A dataclass field with its facts; a default list or dict is copied for each instance."""
    fact = Fact(meaning, tuple(choices), bound, path, old, code)
    metadata = {"fact": fact}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def facts(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Fact]]:
    """(dotted key, value, facts) of every key: those of the root, then those of the groups."""
    groups = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            groups.append((value, f"{prefix}{field.name}."))
        else:
            yield f"{prefix}{field.name}", value, field.metadata.get("fact", Fact())
    for value, inner in groups:
        yield from facts(value, inner)


def at_least(low: float, high: float = MOST) -> Bound:
    """Inclusive bounds of a number, or of every number of a list."""

    def problem(value: float) -> str | None:
        if low <= value <= high:
            return None
        return f"must be at most {_shown(high)}" if value > high else f"must be at least {low}"

    return Bound(f"must be {_shown(low)} to {_shown(high)}", problem)


def above(low: float, high: float = MOST) -> Bound:
    def problem(value: float) -> str | None:
        if low < value <= high:
            return None
        return f"must be at most {_shown(high)}" if value > high else f"must be above {low}"

    return Bound(f"must be above {_shown(low)}, at most {_shown(high)}", problem)


def within(interval: str) -> Bound:
    """An interval in mathematical notation, such as `[0, 0.5)`."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def problem(value: float) -> str | None:
        over = value > low if interval[0] == "(" else value >= low
        under = value < high if interval[-1] == ")" else value <= high
        return None if over and under else f"must be in {interval}"

    return Bound(f"must be in {interval}", problem)


def heat(greedy: bool = True) -> Bound:
    """A sampling temperature; greedy: allows 0. Logits divided by less than COLDEST overflow."""
    positive = at_least(COLDEST, HOTTEST)
    if not greedy:
        return positive
    says = positive.says.replace("must be", "must be 0 (greedy) or")
    return Bound(says, lambda value: None if value == 0 or not positive.problem(value) else says)


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def day() -> Bound:
    says = "must be a date such as 2026-01-31"

    def problem(text: str) -> str | None:
        try:
            datetime.date.fromisoformat(text)
        except ValueError:
            return says
        return None

    return Bound(says, problem)
