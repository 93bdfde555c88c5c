"""stage=online-dpo: its keys, and how rounds, steps and prompts must divide each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dpo_cli.config.keys import HUGE, at_least, heat, key, within
from dpo_cli.config.rewards import HttpJudgeConfig
from dpo_cli.config.stages.base import (
    StageSpec,
    changed,
    decoded_together_key,
    new_tokens_key,
    no_effect,
)
from dpo_cli.config.stages.dpo import PreferenceConfig, loss_problems, losses_of, reads_reference
from dpo_cli.config.stages.shared import unreachable_judge
from dpo_cli.losses import LOSSES

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig

CPU_BATCH = 128


@dataclass
class OnlineDpoConfig(PreferenceConfig):
    """Preference losses on pairs of the policy's own completions, sampled anew in every round."""

    name: str = key("online-dpo", "which stage")
    by: str = key(
        "reward_fn", "what ranks completions: reward_fn | judge (every two of a prompt)",
        choices=("reward_fn", "judge"),
    )  # fmt: skip
    completions: int = key(4, "completions per prompt", bound=at_least(2, 1000))
    rollout_prompts: int | None = key(
        None, "prompts sampled per round; null: those of one step (train.batch_size), which then "
        "learns from samples of the latest policy", bound=at_least(1, 10**6),
    )  # fmt: skip
    round_epochs: int = key(1, "passes over the pairs of a round", bound=at_least(1, 1000))
    pairs: str = key(
        "best_worst", "best_worst: one pair per prompt | all: every two completions",
        choices=("best_worst", "all"),
    )  # fmt: skip
    labels: str = key(
        "deterministic", "deterministic: the higher reward wins | bradley_terry: drawn at random",
        choices=("deterministic", "bradley_terry"),
    )  # fmt: skip
    label_temperature: float = key(
        1.0, "of bradley_terry: P(a > b) = sigmoid((r_a - r_b) / label_temperature)",
        bound=heat(greedy=False),
    )  # fmt: skip
    no_eos_score: float | None = key(
        None, "score of completions without EOS; null: score them like the others",
        bound=within(f"[-{HUGE}, {HUGE}]"),
    )  # fmt: skip
    reference_every: int | None = key(
        None, "rounds after which the reference moves towards the policy (TR-DPO); null: never",
        bound=at_least(1),
    )  # fmt: skip
    reference_mix: float = key(
        1.0, "how far: 1: it becomes the policy; below: mix * policy + (1 - mix) * reference",
        bound=within("(0, 1]"),
    )  # fmt: skip
    max_new_tokens: int | None = new_tokens_key()
    temperature: float = key(1.0, "of sampling", bound=heat(greedy=False))
    batch_size: int | None = decoded_together_key(CPU_BATCH)
    eval_prompts: int = key(
        64, "held-out prompts sampled at each evaluation", bound=at_least(0, 10**6)
    )


OF_REFERENCE = ("reference", "reference_every", "reference_mix")
OF_REWARD = ("labels", "label_temperature", "no_eos_score")


def prompts_of_round(config: RunConfig) -> int:
    stage = cast(OnlineDpoConfig, config.stage)
    return stage.rollout_prompts or config.train.batch_size


def steps_of_round(config: RunConfig) -> int:
    """Optimizer steps between two rounds of sampling."""
    stage = cast(OnlineDpoConfig, config.stage)
    return prompts_of_round(config) // config.train.batch_size * stage.round_epochs


def problems(config: RunConfig) -> Iterator[str]:
    stage = cast(OnlineDpoConfig, config.stage)
    yield from loss_problems(stage, OF_REFERENCE)
    yield from _rounds(config, stage)
    yield from _ranking(config, stage)
    yield from _moving_reference(config, stage)


def _rounds(config: RunConfig, stage: OnlineDpoConfig) -> Iterator[str]:
    """Rounds of whole steps."""
    prompts, batch = prompts_of_round(config), config.train.batch_size
    if min(prompts, batch, stage.round_epochs) < 1:
        return  # reported as out of bounds
    if prompts % batch:
        yield (
            f"stage.rollout_prompts={prompts}: must be a multiple of train.batch_size={batch}, the "
            "prompts of a step"
        )
    elif (steps := config.train.max_steps) is not None and steps % steps_of_round(config):
        yield (
            f"train.max_steps={steps}: must be a multiple of {steps_of_round(config)}, the steps "
            "of a round (stage.rollout_prompts / train.batch_size * stage.round_epochs)"
        )


def _ranking(config: RunConfig, stage: OnlineDpoConfig) -> Iterator[str]:
    """Keys of the reward and of the judge."""
    drawn = stage.labels == "bradley_terry"
    if stage.by == "judge":
        for name, value in changed(stage, OF_REWARD):
            yield no_effect(name, value, "stage.by=judge")
        if not isinstance(config.judge, HttpJudgeConfig):
            yield (
                f"judge={config.judge.name}: compares by the reward, which is stage.by=reward_fn; "
                "set judge=http (a language model)"
            )
        yield from unreachable_judge(config)
    elif not drawn:
        for name, value in changed(stage, ["label_temperature"]):
            yield no_effect(name, value, "stage.labels=deterministic")
    lists = [name for name in losses_of(stage) if name in LOSSES and LOSSES[name].lists]
    if lists and stage.pairs == "all" and drawn and stage.completions > 2:
        yield (
            f"stage.labels=bradley_terry: {lists[0]} needs a ranking, which pairs drawn one by one "
            "need not have; use stage.labels=deterministic or stage.pairs=best_worst"
        )


def _moving_reference(config: RunConfig, stage: OnlineDpoConfig) -> Iterator[str]:
    every = stage.reference_every
    if every is None:
        if reads_reference(stage):
            for name, value in changed(stage, ["reference_mix"]):
                yield no_effect(name, value, "stage.reference_every=null")
        return
    fixed = f"stage.reference_every={every}: a moving reference is not offered with"
    if config.lora.name != "none":
        yield f"{fixed} lora={config.lora.name}; leave it out"
    if config.hardware.devices * config.hardware.nodes > 1:
        yield f"{fixed} several devices; leave it out"


SPEC = StageSpec(
    OnlineDpoConfig,
    title="Online DPO",
    trains=True,
    takes_labels=True,  # it reads prompts alone
    reference=reads_reference,
    reported=True,
    reads=("reward_fn", "judge"),
    unit="prompt",
    best_metrics={"loss": "lowest", "score": "highest"},
    cpu_batch_size=CPU_BATCH,
    problems=problems,
)
