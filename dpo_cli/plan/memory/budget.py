"""How many tokens per micro-batch fit on a device, if the configuration does not say."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dpo_cli.config import RunConfig, spec_of
from dpo_cli.plan.memory.estimate import estimate
from dpo_cli.plan.memory.facts import Facts
from dpo_cli.train.runtime import MICRO_BATCH_TOKENS

SHARE = 0.9  # of the memory; the rest is for what the estimate does not know
STEP = 256  # tokens
LEAST = 512  # smaller matrices are too slow; a step that runs out of memory halves it anyway


@dataclass(frozen=True)
class Fitting:
    """tokens: of a micro-batch; needed: bytes that the estimate gives them; room: bytes there
    are."""

    tokens: int
    needed: float
    room: float

    def __str__(self) -> str:
        why = f"the most that fits in {SHARE:.0%} of it"
        if self.needed > SHARE * self.room:
            why = "the minimum"
        elif self.tokens >= MICRO_BATCH_TOKENS["cuda"]:
            why = "the default maximum"
        return (
            f"up to {self.tokens:,} tokens at once, estimated at {self.needed / 2**30:.1f} of "
            f"{self.room / 2**30:.1f} GiB: {why}"
        )


def is_open(config: RunConfig, device: str) -> bool:
    """Whether the tokens per micro-batch are chosen by the memory available."""
    chosen = config.train.micro_batch_tokens is not None
    return device == "cuda" and not chosen and spec_of(config.stage).trains


def fitting(config: RunConfig, facts: Facts, room: float) -> Fitting:
    """The most tokens, up to the default, whose estimate leaves a tenth of the room free.

    Starting there costs nothing; starting too high costs a failed step for each halving.
    """

    def needed(tokens: int) -> float:
        return estimate(with_tokens(config, tokens), facts).total

    least = -(-max(LEAST, facts.texts.longest) // STEP)
    most = max(least, MICRO_BATCH_TOKENS[facts.device] // STEP)
    while least < most:  # bisection: least fits, or nothing is known to
        middle = (least + most + 1) // 2
        if needed(middle * STEP) <= SHARE * room:
            least = middle
        else:
            most = middle - 1
    return Fitting(least * STEP, needed(least * STEP), room)


def with_tokens(config: RunConfig, tokens: int) -> RunConfig:
    return replace(config, train=replace(config.train, micro_batch_tokens=tokens))
