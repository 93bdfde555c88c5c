"""Which numbers a key may have, and which days."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import Any

Bound = tuple[str, Callable[[Any], bool]]


def at_least(least: float) -> Bound:
    return f"must be at least {least}", lambda value: least <= value < math.inf


def above(least: float) -> Bound:
    return f"must be above {least}", lambda value: least < value < math.inf


def within(interval: str) -> Bound:
    """An interval as mathematicians write it, such as `[0, 0.5)`."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def inside(value: float) -> bool:
        over = value > low if interval[0] == "(" else value >= low
        return over and (value < high if interval[-1] == ")" else value <= high)

    return f"must be in {interval}", inside


def is_day(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


BOUNDS: dict[str, Bound] = {
    "seed": at_least(0),
    "model.dropout": within("[0, 1)"),
    "model.lr_scale": above(0),
    "model.architecture.layers": at_least(1),
    "model.architecture.hidden": at_least(1),
    "model.architecture.heads": at_least(1),
    "model.architecture.context": at_least(8),
    "model.architecture.vocab": at_least(1),
    "data.rows": at_least(1),
    "data.eval_rows": at_least(0),
    "data.max_rows": at_least(1),
    "data.max_length": at_least(2),
    "data.max_prompt_length": at_least(1),
    "data.min_prompt_words": at_least(1),
    "data.date": ("must be a day such as 2026-01-31", is_day),
    "data.responses": at_least(1),
    "data.min_score_ratio": at_least(1),
    "data.max_pairs_per_prompt": at_least(1),
    "stage.beta": above(0),
    "stage.label_smoothing": within("[0, 0.5)"),
    "stage.nll_weight": at_least(0),
    "stage.alpha": at_least(0),
    "stage.center_coefficient": at_least(0),
    "stage.prompts": at_least(0),
    "stage.eval_prompts": at_least(0),
    "stage.completions": at_least(1),
    "stage.temperature": at_least(0),
    "stage.top_p": within("(0, 1]"),
    "stage.max_new_tokens": at_least(1),
    "stage.batch_size": at_least(1),
    "stage.flip_rate": within("[0, 1]"),
    "stage.examples": at_least(1),
    "stage.rollout_samples": at_least(1),
    "stage.ppo_epochs": at_least(1),
    "stage.gamma": within("[0, 1]"),
    "stage.gae_lambda": within("[0, 1]"),
    "stage.clip_range": above(0),
    "stage.value_clip_range": above(0),
    "stage.vf_coef": at_least(0),
    "stage.value_lr_scale": above(0),
    "stage.kl_coef": at_least(0),
    "stage.target_kl": above(0),
    "stage.kl_horizon": at_least(1),
    "stage.normalise_prompts": at_least(0),
    "stage.normalise_max_new_tokens": at_least(1),
    "stage.score_clip": above(0),
    "stage.ratio_limit": above(1),
    "stage.reference_samples": at_least(0),
    "reward_fn.max_length": at_least(1),
    "reward_fn.batch_size": at_least(1),
    "judge.max_tokens": at_least(1),
    "judge.timeout_seconds": above(0),
    "judge.retries": at_least(0),
    "judge.max_calls": at_least(1),
    "judge.parallel": at_least(1),
    "optim.lr": at_least(0),
    "optim.weight_decay": at_least(0),
    "optim.alpha": within("[0, 1)"),
    "optim.eps": above(0),
    "optim.warmup_steps": at_least(0),
    "optim.warmup_ratio": within("[0, 1]"),
    "optim.max_grad_norm": within("[0, inf]"),
    "train.epochs": above(0),
    "train.max_steps": at_least(1),
    "train.batch_size": at_least(1),
    "train.micro_batch_tokens": at_least(1),
    "train.eval_every_steps": at_least(0),
    "train.save_every_steps": at_least(0),
    "train.save_every_minutes": above(0),
    "train.keep_checkpoints": at_least(1),
    "train.log_every_steps": at_least(1),
    "train.sample_prompts": at_least(0),
    "train.sample_max_new_tokens": at_least(1),
    "train.sample_temperature": above(0),
    "lora.r": at_least(1),
    "lora.alpha": above(0),
    "lora.dropout": within("[0, 1)"),
    "lora.lr_scale": above(0),
    "hardware.activation_checkpointing": at_least(0),
    "hardware.devices": at_least(1),
    "hardware.nodes": at_least(1),
    "hardware.timeout_seconds": at_least(1),
    "hardware.memory_gb": above(0),
    "hardware.threads": at_least(1),
}
