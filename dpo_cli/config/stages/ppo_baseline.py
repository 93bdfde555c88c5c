"""PPO: its keys, and how rollouts, steps and prompts must divide each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from dpo_cli.config.keys import HUGE, above, at_least, heat, key, within
from dpo_cli.config.stages.base import (
    StageConfig,
    StageSpec,
    changed,
    decoded_together_key,
    frozen_reference_key,
    new_tokens_key,
    no_effect,
)

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig

CPU_BATCH = 128
CRITIC = ("gae_lambda", "value_clip_range", "vf_coef", "value_lr_scale")  # keys only it reads


@dataclass(frozen=True)
class Advantage:
    """An estimator of advantages. title: what pages call training with it; unread: keys that it
    does not read; grouped: it compares the completions of a prompt, so it needs several."""

    title: str
    unread: tuple[str, ...]
    grouped: bool = False


ADVANTAGES = {
    "gae": Advantage("PPO", ("group_std",)),
    "rloo": Advantage("RLOO", (*CRITIC, "gamma", "whiten_advantages", "group_std"), True),
    "grpo": Advantage("GRPO", (*CRITIC, "gamma", "whiten_advantages"), True),
    "reinforce++": Advantage("REINFORCE++", (*CRITIC, "group_std")),
}


@dataclass
class PpoConfig(StageConfig):
    """Reinforcement learning on a reward: the baseline DPO is compared with."""

    name: str = key("ppo-baseline", "which stage")
    default_lr: float = key(
        1.4e-5, "of full fine-tuning; optim.lr takes precedence", bound=at_least(0, 1)
    )
    reference: str | None = frozen_reference_key()
    advantage: str = key(
        "gae", "gae: PPO's, with a critic | rloo, grpo, reinforce++: without one",
        choices=tuple(ADVANTAGES),
    )  # fmt: skip
    rollout_samples: int = key(512, "completions per rollout", bound=at_least(1, 10**6))
    completions: int = key(1, "completions per prompt", bound=at_least(1, 10**5))
    max_new_tokens: int | None = new_tokens_key()
    temperature: float = key(
        1.0, "of sampling; logits are divided by it in policy and reference alike",
        bound=heat(),
    )  # fmt: skip
    batch_size: int | None = decoded_together_key(CPU_BATCH)
    ppo_epochs: int = key(
        4,
        "passes over a rollout, in steps of train.batch_size completions",
        bound=at_least(1, 1000),
    )
    gamma: float = key(1.0, "discount", bound=within("[0, 1]"))
    gae_lambda: float = key(
        0.95, "lambda of generalized advantage estimation", bound=within("[0, 1]")
    )
    clip_range: float = key(0.2, "of the policy's ratio", bound=above(0, 1e6))
    value_clip_range: float = key(0.2, "of the value's change", bound=above(0, HUGE))
    vf_coef: float = key(0.1, "weight of the value loss", bound=at_least(0, 1e6))
    value_lr_scale: float = key(
        10.0, "factor on optim.lr for the value head, which starts at zero", bound=above(0, 1e6)
    )
    whiten_advantages: bool = key(True, "scale advantages to mean 0 and std 1")
    group_std: bool = key(
        True, "grpo: divide by the std of a prompt's rewards; false: Dr. GRPO's advantages"
    )
    loss_average: str = key(
        "tokens", "tokens: over all tokens | sequences: of each completion's mean (GRPO) | "
        "constant: of each completion's sum / max_new_tokens (Dr. GRPO)",
        choices=("tokens", "sequences", "constant"),
    )  # fmt: skip
    kl_in: str = key(
        "reward", "where the KL penalty is: reward | loss", choices=("reward", "loss")
    )  # fmt: skip
    kl_estimator: str = key(
        "k1", "of the KL: k1 in the reward; k2 or k3 (GRPO's) in the loss",
        choices=("k1", "k2", "k3"),
    )  # fmt: skip
    kl_control: str = key(
        "adaptive", "adaptive: towards stage.target_kl | fixed", choices=("adaptive", "fixed")
    )
    kl_coef: float = key(
        0.2, "weight of the KL per token; where adaptive starts", bound=at_least(0, 1e6)
    )
    target_kl: float = key(6.0, "nats per sequence", bound=above(0, 1e6))
    kl_horizon: int = key(10000, "completions; a smaller one adapts faster", bound=at_least(1))
    normalize: bool = key(
        True, "scale scores to mean 0 and std 1 on samples of the reference", old="normalise"
    )
    normalize_prompts: int = key(
        256, "one sample of the reference each", bound=at_least(0, 10**6), old="normalise_prompts"
    )
    whiten_scores: bool = key(
        False, "scale each rollout's scores to mean 0 and std 1, before they are clipped"
    )
    score_clip: float | None = key(
        None, "largest absolute score after scaling; null: any", bound=above(0, HUGE)
    )
    no_eos_score: float | None = key(
        -1.0,
        "score of completions without EOS; null: score them like the others",
        bound=within(f"[-{HUGE}, {HUGE}]"),
    )
    ratio_limit: float = key(
        10.0, "completions whose mean ratio exceeds it are skipped", bound=above(1, HUGE)
    )
    eval_prompts: int = key(
        64, "held-out prompts sampled at each evaluation", bound=at_least(0, 10**6)
    )


UNREAD: list[tuple[str, Any, list[str]]] = [  # a key, its value, and what that leaves unread
    ("normalize", False, ["normalize_prompts"]),
    ("vf_coef", 0.0, ["value_lr_scale"]),
    ("kl_control", "fixed", ["target_kl", "kl_horizon"]),
    *(("advantage", name, list(chosen.unread)) for name, chosen in ADVANTAGES.items()),
]


def problems(config: RunConfig) -> Iterator[str]:
    stage = cast(PpoConfig, config.stage)
    yield from _rollouts(config, stage)
    if coefficient := config.train.router_aux_loss_coef:
        yield no_effect("train.router_aux_loss_coef", coefficient, "stage=ppo-baseline")
    if stage.temperature == 0:
        yield "stage.temperature=0.0: must be above 0, PPO explores"
    if config.model.dropout:
        yield f"model.dropout={config.model.dropout}: must be 0, policy and rollout would differ"
    if stage.normalize and not stage.normalize_prompts:
        yield "stage.normalize_prompts=0: nothing to measure; use stage.normalize=false"
    if stage.normalize and stage.whiten_scores:
        yield "stage.whiten_scores=true: undoes stage.normalize; use stage.normalize=false"
    yield from _estimator(stage)
    for switch, off, unread in UNREAD:
        if getattr(stage, switch) == off:
            for name, value in changed(stage, unread):
                yield no_effect(name, value, f"stage.{switch}={str(off).lower()}")


def _estimator(stage: PpoConfig) -> Iterator[str]:
    chosen = ADVANTAGES.get(stage.advantage)
    if chosen and chosen.grouped and stage.completions == 1:
        yield (
            f"stage.completions=1: stage.advantage={stage.advantage} compares completions of the "
            "same prompt; set 2 or more"
        )
    estimator = f"stage.kl_estimator={stage.kl_estimator}"
    if stage.kl_in == "reward" and stage.kl_estimator != "k1":
        yield f"{estimator}: has a biased gradient in the reward; use k1, or stage.kl_in=loss"
    if stage.kl_in == "loss" and stage.kl_estimator == "k1":
        yield f"{estimator}: has a gradient of mean zero in the loss; use k2 or k3"


def _rollouts(config: RunConfig, stage: PpoConfig) -> Iterator[str]:
    """Rollouts of whole prompts, learnt from in whole passes of whole steps."""
    size, batch, steps = stage.rollout_samples, config.train.batch_size, config.train.max_steps
    if min(size, batch, stage.completions, stage.ppo_epochs) < 1:
        return  # reported as out of bounds
    if size % stage.completions:
        yield f"stage.completions={stage.completions}: must divide stage.rollout_samples={size}"
    elif size % batch or batch % stage.completions:
        yield (
            f"train.batch_size={batch}: must divide stage.rollout_samples={size} and be a multiple "
            f"of stage.completions={stage.completions}"
        )
    elif steps is not None and steps % (size // batch * stage.ppo_epochs):
        yield (
            f"train.max_steps={steps}: must be a multiple of {size // batch * stage.ppo_epochs}, "
            "the steps of a rollout (stage.rollout_samples / train.batch_size * stage.ppo_epochs)"
        )


SPEC = StageSpec(
    PpoConfig,
    title="PPO",
    trains=True,
    takes_labels=True,  # it reads prompts alone
    reference=lambda stage: True,
    reported=True,
    reads=("reward_fn",),
    unit="prompt",
    best_metrics={"loss": "lowest", "score": "highest"},
    cpu_batch_size=CPU_BATCH,
    problems=problems,
)
