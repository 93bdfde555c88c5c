"""Overrides that make a run fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from dpo_cli.config import RunConfig, spec_of
from dpo_cli.config.checks import check
from dpo_cli.errors import ConfigError
from dpo_cli.plan.memory.estimate import estimate
from dpo_cli.plan.memory.facts import Facts
from dpo_cli.plan.memory.parts import token_budget

MIN_TOKENS = 512  # per micro-batch: smaller matrices are too slow
RANKS = (2, 4, 8)  # devices of a node
ROUNDED = "small updates are lost to rounding"


@dataclass(frozen=True)
class Change:
    """words: the overrides; apply: the same change to a configuration."""

    words: str
    apply: Callable[[RunConfig], RunConfig]
    caveat: str = ""


@dataclass(frozen=True)
class Advice:
    """total: bytes needed on one device with the change; capacity: bytes it has."""

    change: Change
    total: float
    capacity: float

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def advise(config: RunConfig, facts: Facts, capacity: float) -> list[Advice]:
    """The single changes that make the run fit, mildest first; otherwise the best pair of changes,
    which may not fit either; empty if there are no candidates."""
    changes = [change for change in candidates(config, facts) if _allowed(change, config)]
    singles = [_try(change, config, facts, capacity) for change in changes]
    if fitting := [advice for advice in singles if advice.fits]:
        return _mildest(fitting)
    # Ordered by the harsher of the two, so that the mildest pair comes first.
    places = sorted(combinations(range(len(changes)), 2), key=lambda pair: pair[::-1])
    pairs = [
        _try(both, config, facts, capacity)
        for i, j in places
        if _key(changes[i]) != _key(changes[j])
        and _allowed(both := _both(changes[i], changes[j]), config)
    ]
    fitting = [advice for advice in pairs if advice.fits]
    return fitting[:1] or sorted([*singles, *pairs], key=lambda advice: advice.total)[:1]


def candidates(config: RunConfig, facts: Facts) -> Iterator[Change]:
    """Changes that save memory, mildest first."""
    if spec_of(config.stage).trains:
        yield from _tokens(config, facts)
        if not config.hardware.activation_checkpointing:
            yield _set("hardware", "activation_checkpointing", 1)
        if getattr(config.stage, "reference_logprobs", None) == "live":
            yield _set("stage", "reference_logprobs", "cached")
        yield from _optimizers(config, facts.device)
    yield from _sequences(config)
    if spec_of(config.stage).trains:
        yield from _fewer_weights(config, facts)


def _tokens(config: RunConfig, facts: Facts) -> Iterator[Change]:
    """Halve the tokens repeatedly, as long as the longest example fits."""
    tokens = min(token_budget(config, facts.device), facts.texts.step) // 2
    while tokens >= max(MIN_TOKENS, facts.texts.longest):
        yield _set("train", "micro_batch_tokens", tokens)
        tokens //= 2


def _optimizers(config: RunConfig, device: str) -> Iterator[Change]:
    order = ("adamw", "rmsprop", "adamw8bit")  # by the size of their state
    for name in reversed(order[order.index(config.optim.name) + 1 :]):
        if name != "adamw8bit" or device == "cuda":
            yield _choose("optim", name)


def _sequences(config: RunConfig) -> Iterator[Change]:
    named = getattr(config.stage, "batch_size", None)
    size = named or spec_of(config.stage).cpu_batch_size or 1
    while size > 1:
        size //= 2
        yield _set("stage", "batch_size", size)


def _fewer_weights(config: RunConfig, facts: Facts) -> Iterator[Change]:
    now = config.hardware.devices
    if facts.device == "cuda":
        yield from (_set("hardware", "devices", count) for count in RANKS if count > now)
    if config.lora.name == "none":
        yield _choose("lora", "lora")
    if config.lora.quantization != "nf4":
        yield _choose("lora", "qlora", quantization="nf4")
    half = facts.half and config.lora.name == "none" and config.hardware.weights == "fp32"
    if half:
        yield replace(_set("hardware", "weights", "bf16"), caveat=ROUNDED)


def _set(group: str, key: str, value: Any) -> Change:
    def apply(config: RunConfig) -> RunConfig:
        return replace(config, **{group: replace(getattr(config, group), **{key: value})})

    return Change(f"{group}.{key}={value}", apply)


def _choose(group: str, name: str, **keys: Any) -> Change:
    """Another option of a group. keys: values that its YAML sets besides the name."""

    def apply(config: RunConfig) -> RunConfig:
        return replace(config, **{group: replace(getattr(config, group), name=name, **keys)})

    return Change(f"{group}={name}", apply)


def _key(change: Change) -> str:
    """The key of a change: two changes of one key exclude each other."""
    return change.words.partition("=")[0]


def _both(first: Change, second: Change) -> Change:
    caveats = "; ".join(filter(None, (first.caveat, second.caveat)))
    words = f"{first.words} {second.words}"
    return Change(words, lambda config: second.apply(first.apply(config)), caveats)


def _allowed(change: Change, config: RunConfig) -> bool:
    """Whether the changed configuration is valid."""
    try:
        check(change.apply(config))
    except ConfigError:
        return False
    return True


def _try(change: Change, config: RunConfig, facts: Facts, capacity: float) -> Advice:
    return Advice(change, estimate(change.apply(config), facts).total, capacity)


def _mildest(fitting: Sequence[Advice]) -> list[Advice]:
    """Keep the first fitting value per key: half the tokens, but not also a quarter."""
    mildest: list[Advice] = []
    for advice in fitting:
        key = _key(advice.change)
        if "." not in key or key not in [_key(other.change) for other in mildest]:
            mildest.append(advice)
    return mildest
