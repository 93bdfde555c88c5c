"""The input of a check, the facts it yields, and how they are judged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


class Skip(Exception):
    """Raised by a check that cannot run here, with the reason."""


@dataclass(frozen=True)
class Setup:
    """device: cuda, or cpu for the small form of a check. work: a folder shared by all checks.
    data: pairs of Anthropic HH, None for generated ones. threads: CPU threads of this check.
    seconds: after which it is killed."""

    device: str
    work: str
    data: str | None = None
    tokenizer: str | None = None
    threads: int = 2
    seconds: float = 60.0

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    def folder(self, name: str) -> Path:
        path = Path(self.work, name)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def text(self) -> str:
        return json.dumps(asdict(self))


Fact = tuple[str, Any]  # what was measured, with its unit, and its value
Check = Callable[[Setup], Iterator[Fact]]


@dataclass(frozen=True)
class Expect:
    """Expectation for all facts whose names match `fact`, at least one.

    low, high: bounds; values outside fail the step. about: an estimate made before any run on a
    GPU; values outside are reported but do not fail. On a CPU, where a check has a small form,
    estimates and expectations for `cuda` do not apply. optional: the fact may be missing.
    """

    fact: str
    low: float = -math.inf
    high: float = math.inf
    about: tuple[float, float] | None = None
    cuda: bool = False
    optional: bool = False

    def bounds(self) -> str:
        limits = []
        if self.low == self.high:
            limits.append(f"= {self.low:g}")
        else:
            if self.low > -math.inf:
                limits.append(f">= {self.low:g}")
            if self.high < math.inf:
                limits.append(f"<= {self.high:g}")
        if self.about is not None:
            limits.append("estimate " + " to ".join(f"{x:g}" for x in self.about))
        return f"{self.fact}: {', '.join(limits) or 'seen'}"


@dataclass(frozen=True)
class Verdict:
    unseen: list[str]
    wrong: list[str]
    notes: list[str]

    @property
    def failures(self) -> list[str]:
        return [*self.unseen, *self.wrong]


def judge(expected: Sequence[Expect], facts: Mapping[str, Any], device: str) -> Verdict:
    """Violated bounds, and deviations from estimates."""
    unseen: list[str] = []
    wrong: list[str] = []
    notes: list[str] = []
    for expect in expected:
        if expect.cuda and device == "cpu":
            continue
        matching = {k: v for k, v in facts.items() if fnmatchcase(k, expect.fact)}
        if not matching and not expect.optional:
            unseen.append(f"{expect.fact}: not seen")
        for name, value in matching.items():
            inside = isinstance(value, (int, float)) and expect.low <= value <= expect.high
            if not inside:  # NaN is not, either
                wrong.append(f"{name}: {shown(value)}, must be {expect.bounds()}")
            elif expect.about is not None and device == "cuda":
                low, high = expect.about
                if not low <= value <= high:
                    notes.append(f"{name}: {shown(value)}, estimated {low:g} to {high:g}")
    return Verdict(unseen, wrong, notes)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)
