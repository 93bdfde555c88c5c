"""The number of tokens per micro-batch that fits on a device, if it is not configured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dpo_cli.config import RunConfig, spec_of
from dpo_cli.plan.memory.estimate import estimate
from dpo_cli.plan.memory.facts import Facts
from dpo_cli.train.runtime import MICRO_BATCH_TOKENS

SHARE = 0.9  # of the memory; the rest is a margin for the estimate's error
STEP = 256  # tokens
LEAST = 512  # tokens: smaller matrices are too slow; a step that runs out of memory halves it


@dataclass(frozen=True)
class Fitting:
    """tokens: per micro-batch; needed: their estimated bytes; room: available bytes."""

    tokens: int
    needed: float
    room: float

    def __str__(self) -> str:
        reason = f"the maximum that fits in {SHARE:.0%} of it"
        if self.needed > SHARE * self.room:
            reason = "the minimum"
        elif self.tokens >= MICRO_BATCH_TOKENS["cuda"]:
            reason = "the default maximum"
        return (
            f"up to {self.tokens:,} tokens at once, estimated at {self.needed / 2**30:.1f} of "
            f"{self.room / 2**30:.1f} GiB: {reason}"
        )


def is_open(config: RunConfig, device: str) -> bool:
    """Whether the tokens per micro-batch are chosen by the memory available."""
    chosen = config.train.micro_batch_tokens is not None
    return device == "cuda" and not chosen and spec_of(config.stage).trains


def fitting(config: RunConfig, facts: Facts, room: float) -> Fitting:
    """The maximum number of tokens, up to the default, whose estimate leaves 10% of `room` free.

    Starting too high would cost a failed step per halving.
    """

    def needed(tokens: int) -> float:
        return estimate(with_tokens(config, tokens), facts).total

    least = -(-max(LEAST, facts.texts.longest) // STEP)
    most = max(least, MICRO_BATCH_TOKENS[facts.device] // STEP)
    while least < most:  # bisection: `least` fits, or is the minimum
        middle = (least + most + 1) // 2
        if needed(middle * STEP) <= SHARE * room:
            least = middle
        else:
            most = middle - 1
    return Fitting(least * STEP, needed(least * STEP), room)


def with_tokens(config: RunConfig, tokens: int) -> RunConfig:
    return replace(config, train=replace(config.train, micro_batch_tokens=tokens))
