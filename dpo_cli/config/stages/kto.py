"""stage=kto: keys of the losses on single responses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_cli.config.datasets import JsonlDataConfig
from dpo_cli.config.keys import above, at_least, key
from dpo_cli.config.stages.base import StageConfig, StageSpec, frozen_reference_key
from dpo_cli.config.stages.shared import unpaired
from dpo_cli.losses.kto import SINGLE_LOSSES

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig


@dataclass
class KtoConfig(StageConfig):
    """Losses on single responses, each labeled desirable or not, against a frozen reference."""

    name: str = key("kto", "which stage")
    default_lr: float = key(
        1e-6, "of full fine-tuning; optim.lr takes precedence", bound=at_least(0, 1)
    )
    loss: str = key("kto", "the loss of a response", choices=tuple(SINGLE_LOSSES))
    beta: float = key(0.1, "strength of the KL penalty towards the reference", bound=above(0, 1e6))
    desirable_weight: float = key(1.0, "weight of desirable responses", bound=at_least(0, 1e6))
    undesirable_weight: float = key(1.0, "weight of undesirable responses", bound=at_least(0, 1e6))
    reference: str | None = frozen_reference_key()
    reference_logprobs: str = key(
        "cached", "cached: one pass before training | live: every step",
        choices=("cached", "live"),
    )  # fmt: skip


def problems(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not (isinstance(data, JsonlDataConfig) and data.label_field):
        yield from unpaired(config)  # pairs give a desirable and an undesirable response each


SPEC = StageSpec(
    KtoConfig,
    title="KTO",
    method="Kahneman-Tversky Optimization",
    trains=True,
    reference=lambda stage: True,
    paired=True,
    takes_labels=True,
    reported=True,
    unit="response",
    best_metrics={"loss": "lowest", "rewards/margins": "highest"},
    problems=problems,
)
