"""The estimate as a table, and overrides that would make it fit."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.config import RunConfig, spec_of
from dpo_cli.plan.memory.advice import Advice, advise
from dpo_cli.plan.memory.estimate import estimate, saved_bytes
from dpo_cli.plan.memory.facts import Facts

Row = tuple[str, object]
UNIT = {"cpu": "process", "cuda": "GPU"}


def memory_rows(config: RunConfig, facts: Facts, capacity: float | None) -> list[Row]:
    """One row per part, the total, whether it fits in `capacity` bytes, and remedies."""
    needed, unit = estimate(config, facts), UNIT[facts.device]
    rows: list[Row] = [(name, gib(size)) for name, size in needed.parts.items()]
    rows.append((f"total per {unit}", f"{gib(needed.total)}, peak in {needed.moment}"))
    if capacity is None:
        return [*rows, ("fits", "unknown: set hardware.memory_gb=<GiB of one GPU>")]
    available = f"a {unit} has {gib(capacity)}"
    if needed.total <= capacity:
        return [*rows, ("fits", f"yes, {available}")]
    return [*rows, ("fits", f"no, {available}"), *_advice(advise(config, facts, capacity))]


def copy_rows(config: RunConfig, facts: Facts) -> list[Row]:
    """Host memory for checkpoints, used only if twice as much is free; not in the estimate."""
    hardware = config.hardware
    if not spec_of(config.stage).trains or hardware.devices * hardware.nodes > 1:
        return []
    size = gib(saved_bytes(config, facts))
    line = f"copied to {size} of host memory if twice that is free, else training waits for saves"
    return [("checkpoints", line)]


def _advice(remedies: Sequence[Advice]) -> list[Row]:
    if not remedies:
        return [("", "no known setting reduces it")]
    if not remedies[0].fits:
        best = remedies[0]
        smallest = f"{best.change.words}: still {gib(best.total)}"
        return [("remedy", "no two changes make it fit; the closest is"), ("", smallest)]
    pair = " " in remedies[0].change.words
    first = "no single change makes it fit, but this pair" if pair else "any one of these"
    return [("remedy", first), *(("", _line(advice)) for advice in remedies)]


def _line(advice: Advice) -> str:
    caveat = f" ({advice.change.caveat})" if advice.change.caveat else ""
    return f"{advice.change.words}: {gib(advice.total)}{caveat}"


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
