"""Reward models: their keys."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.config.keys import at_least, key, within
from dpo_cli.config.stages.base import StageConfig, StageSpec
from dpo_cli.config.stages.shared import unpaired


@dataclass
class RewardConfig(StageConfig):
    """A Bradley-Terry reward model on ranked responses."""

    name: str = key("reward", "which stage")
    default_lr: float = key(
        1e-5, "of full fine-tuning; optim.lr takes precedence", bound=at_least(0, 1)
    )
    label_smoothing: float = key(
        0.0, "probability that a label is flipped", bound=within("[0, 0.5)")
    )
    margins: bool = key(
        False, "margin in the loss: the difference of the data's scores (data with scores)"
    )
    center_coefficient: float = key(
        0.0, "weight of (r_w + r_l)^2, which centers rewards at zero; try 0.01",
        bound=at_least(0, 1e6),
    )  # fmt: skip
    normalize_prompts: int = key(
        256, "prompts with one base-model sample each, for mean and std of rewards; 0: none",
        bound=at_least(0, 10**6), old="normalise_prompts",
    )  # fmt: skip
    normalize_max_new_tokens: int = key(
        48, "maximum tokens of these samples",
        bound=at_least(1, 2**20), old="normalise_max_new_tokens",
    )  # fmt: skip


SPEC = StageSpec(
    RewardConfig,
    title="Reward model",
    method="training as a reward model",
    trains=True,
    reward_head=True,
    paired=True,
    reported=True,
    unit="pair",
    best_metrics={"loss": "lowest", "rewards/accuracies": "highest", "ece": "lowest"},
    problems=unpaired,
)
