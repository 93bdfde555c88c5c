"""The estimate as rows of a table, and what to type where it does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.config import RunConfig, spec_of
from dpo_cli.plan.memory.advice import Advice, advise
from dpo_cli.plan.memory.estimate import estimate, saved_bytes
from dpo_cli.plan.memory.facts import Facts

Row = tuple[str, object]
UNIT = {"cpu": "process", "cuda": "GPU"}


def memory_rows(config: RunConfig, facts: Facts, capacity: float | None) -> list[Row]:
    """A row a part, the total, whether it fits in `capacity` bytes, and what would make it."""
    found, unit = estimate(config, facts), UNIT[facts.device]
    rows: list[Row] = [(name, gib(size)) for name, size in found.parts.items()]
    rows.append((f"in all, a {unit}", f"{gib(found.total)}, reached in {found.moment}"))
    if capacity is None:
        return [*rows, ("fits", "set hardware.memory_gb=<GiB of one GPU> to be told")]
    has = f"a {unit} has {gib(capacity)}"
    if found.total <= capacity:
        return [*rows, ("fits", f"yes, {has}")]
    return [*rows, ("fits", f"no, {has}"), *_advice(advise(config, facts, capacity))]


def copy_rows(config: RunConfig, facts: Facts) -> list[Row]:
    """Memory beside the estimate, which a run takes only where there is plenty of it."""
    hardware = config.hardware
    if not spec_of(config.stage).trains or hardware.devices * hardware.nodes > 1:
        return []
    size = gib(saved_bytes(config, facts))
    told = f"copy {size} to the host's memory where twice that is free, else training waits"
    return [("saves", told)]


def _advice(found: Sequence[Advice]) -> list[Row]:
    if not found:
        return [("", "no change of settings is known that makes it smaller")]
    if not found[0].fits:
        best = found[0]
        smallest = f"{best.change.words}: still {gib(best.total)}"
        return [("remedy", "no two changes make it fit; nearest comes"), ("", smallest)]
    pair = " " in found[0].change.words
    first = "no single change makes it fit, but this pair" if pair else "any one of these"
    return [("remedy", first), *(("", _line(advice)) for advice in found)]


def _line(advice: Advice) -> str:
    caveat = f" ({advice.change.caveat})" if advice.change.caveat else ""
    return f"{advice.change.words}: {gib(advice.total)}{caveat}"


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
