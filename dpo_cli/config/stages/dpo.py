"""Preference losses: their keys, and which loss reads which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dpo_cli.config.keys import above, at_least, key, within
from dpo_cli.config.stages.base import (
    StageConfig,
    StageSpec,
    changed,
    frozen_reference_key,
    no_effect,
)
from dpo_cli.config.stages.shared import unpaired

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig


@dataclass(frozen=True)
class Loss:
    """One entry of `losses.LOSSES`, as far as it concerns the user."""

    title: str  # what pages call training with it
    method: str  # what a model card says the model is the result of
    options: frozenset[str]  # the keys of DpoConfig it reads


LOSS_FACTS = {
    "sigmoid": Loss(
        "DPO",
        "Direct Preference Optimization",
        frozenset({"beta", "label_smoothing", "length_normalized", "nll_weight"}),
    ),
    "hinge": Loss(
        "DPO with the hinge loss",
        "Direct Preference Optimization with the hinge loss (SLiC)",
        frozenset({"beta", "length_normalized", "nll_weight"}),
    ),
    "ipo": Loss("IPO", "Identity Preference Optimization", frozenset({"beta", "nll_weight"})),
    "unlikelihood": Loss("Unlikelihood", "unlikelihood training on pairs", frozenset({"alpha"})),
    "plackett_luce": Loss(
        "Plackett-Luce DPO",
        "Direct Preference Optimization on rankings (Plackett-Luce)",
        frozenset({"beta", "nll_weight"}),
    ),
}


@dataclass
class DpoConfig(StageConfig):
    """Preference losses on pairs, against a frozen reference."""

    name: str = key("dpo", "which stage")
    default_lr: float = key(1e-6, "of full fine-tuning; optim.lr takes precedence")
    loss: str = key("sigmoid", "sigmoid is DPO's own", choices=tuple(LOSS_FACTS))
    beta: float = key(0.1, "strength of the pull towards the reference (ipo: its tau)",
                      bound=above(0))  # fmt: skip
    label_smoothing: float = key(
        0.0, "cDPO: probability that a label is flipped", bound=within("[0, 0.5)")
    )
    length_normalized: bool = key(
        False, "divide log-ratios by the response's tokens", old="length_normalised"
    )
    nll_weight: float = key(
        0.0, "weight of the chosen response's NLL per token (RPO)", bound=at_least(0)
    )
    alpha: float = key(0.1, "unlikelihood: weight of the rejected response", bound=at_least(0))
    reference: str | None = frozen_reference_key()
    reference_logprobs: str = key(
        "cached", "cached: one pass before training | live: every step",
        choices=("cached", "live"),
    )  # fmt: skip


def problems(config: RunConfig) -> Iterator[str]:
    """Options that the chosen loss would silently ignore."""
    yield from unpaired(config)
    stage = cast(DpoConfig, config.stage)
    if stage.loss not in LOSS_FACTS:
        return  # reported as an unknown choice
    options = frozenset[str]().union(*(loss.options for loss in LOSS_FACTS.values()))
    unread = sorted(options - LOSS_FACTS[stage.loss].options)
    if stage.loss == "unlikelihood":
        unread += ["reference", "reference_logprobs"]
    for name, value in changed(stage, unread):
        yield no_effect(name, value, f"stage.loss={stage.loss}")


SPEC = StageSpec(
    DpoConfig,
    title="DPO",
    method="Direct Preference Optimization",
    trains=True,
    reference=True,
    paired=True,
    reported=True,
    unit="pair",
    best_metrics={
        "loss": "lowest", "rewards/accuracies": "highest", "rewards/margins": "highest"
    },
    problems=problems,
)  # fmt: skip
