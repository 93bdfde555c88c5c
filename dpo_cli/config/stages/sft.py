"""Supervised fine-tuning: its keys."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.config.keys import at_least, key
from dpo_cli.config.stages.base import StageConfig, StageSpec


@dataclass
class SftConfig(StageConfig):
    """Supervised fine-tuning on the best response (Preferred-FT)."""

    name: str = key("sft", "which stage")
    default_lr: float = key(
        1e-5, "of full fine-tuning; optim.lr takes precedence", bound=at_least(0, 1)
    )
    reduction: str = key(
        "mean", "mean over target tokens | sum over an example's tokens", choices=("mean", "sum")
    )
    train_on_prompt: bool = key(False, "learn to predict the prompt as well")


SPEC = StageSpec(
    SftConfig,
    title="Supervised fine-tuning",
    method="supervised fine-tuning",
    trains=True,
    reported=True,
    best_metrics={"loss": "lowest", "perplexity": "lowest", "nll_per_token": "lowest"},
)
