"""What a stage asks of its own keys and of the other groups; see checks.py."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_cli.config import (
    LOSS_OPTIONS,
    REWARD_FN_SCHEMAS,
    DpoConfig,
    EvaluateConfig,
    ExportConfig,
    FrontierConfig,
    HttpJudgeConfig,
    JsonlDataConfig,
    LabelConfig,
    LexiconRewardFn,
    NoRewardFn,
    PpoConfig,
    RewardConfig,
    RunConfig,
    SampleConfig,
    SentimentDataConfig,
    SentimentRewardFn,
)
from dpo_cli.config.endpoint import endpoint_from_environment
from dpo_cli.errors import ConfigError
from dpo_cli.hints import did_you_mean

READERS = {  # group -> the stages that read it
    "reward_fn": ("label", "evaluate", "ppo-baseline"),
    "judge": ("evaluate",),
}
NOT_TRAINED = ("optimum", "best-of-n")  # methods of points that an evaluation adds
OPPONENTS = ("chosen", "reference")


def value_at(config: RunConfig, key: str) -> Any:
    """The value at a dotted key; None where the chosen options have no such key."""
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name, None)
    return node


def no_effect(key: str, value: Any, chosen: str) -> str:
    return f"{key}={value}: has no effect with {chosen}; remove it"


def unread(config: RunConfig, group: str) -> str | None:
    """What makes the run leave a group of READERS aside, as key=value; None where it reads it."""
    stage = config.stage
    if stage.name not in READERS[group]:
        return f"stage={stage.name}"
    by = getattr(stage, "by", "reward_fn")
    return f"stage.by={by}" if group == "reward_fn" and by != "reward_fn" else None


def stage_problems(config: RunConfig) -> Iterator[str]:
    yield from _stage(config)
    yield from _reward_fn(config)


def _stage(config: RunConfig) -> Iterator[str]:
    stage = config.stage
    if isinstance(stage, (DpoConfig, RewardConfig)):
        yield from _pairs(config)
    if isinstance(stage, DpoConfig):
        yield from _loss(stage)
    elif isinstance(stage, LabelConfig):
        yield from _labels(config, stage)
    elif isinstance(stage, PpoConfig):
        yield from _ppo(config, stage)
    elif isinstance(stage, SampleConfig):
        yield from _samples(stage)
    elif isinstance(stage, EvaluateConfig):
        yield from _evaluation(config, stage)
    elif isinstance(stage, ExportConfig):
        yield from _export(config, stage)
    elif isinstance(stage, FrontierConfig) and not stage.evaluations:
        yield "stage.evaluations=[]: nothing to draw; give folders of stage=evaluate runs"


def _export(config: RunConfig, stage: ExportConfig) -> Iterator[str]:
    if not (config.model.path or config.model.hub_id):
        yield "stage=export: nothing to export; set model.path=<folder of a run>"
    named = stage.push_to_hub
    if named is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        yield f"stage.push_to_hub={named}: must be owner/name"


def _labels(config: RunConfig, stage: LabelConfig) -> Iterator[str]:
    if stage.samples is None:
        yield "stage.samples=null: nothing to label; give the folder of a stage=sample run"
    if stage.temperature == 0:
        yield "stage.temperature=0.0: must be above 0; use stage.labels=deterministic"
    if stage.labels == "deterministic" and stage.temperature != 1.0:
        yield no_effect("stage.temperature", stage.temperature, "stage.labels=deterministic")
    defaults = LabelConfig()
    for name in ("reference", "beta") if stage.by == "reward_fn" else ():
        if getattr(stage, name) != getattr(defaults, name):
            yield no_effect(f"stage.{name}", getattr(stage, name), "stage.by=reward_fn")
    if stage.by == "implicit" and not (config.model.path or config.model.hub_id):
        yield "stage.by=implicit: whose reward? Set model.path=<a policy>"


def _temperatures(key: str, values: list[float]) -> Iterator[str]:
    if not values or not all(0 <= value < math.inf for value in values):
        yield f"{key}={values}: must be numbers of at least 0 (0 is greedy), one or more"


def _samples(stage: SampleConfig) -> Iterator[str]:
    yield from _temperatures("stage.temperatures", stage.temperatures)
    if stage.prompts == 0 and stage.eval_prompts == 0:
        yield "stage.prompts=0, stage.eval_prompts=0: nothing to sample; use at least 1 of either"
    if stage.top_p < 1 and not any(stage.temperatures):
        yield no_effect("stage.top_p", stage.top_p, f"stage.temperatures={stage.temperatures}")


def _optimum(stage: EvaluateConfig) -> Iterator[str]:
    samples, key = stage.reference_samples, f"stage.reference_samples={stage.reference_samples}"
    if 0 < samples < 16:
        yield f"{key}: says too little of the optimum; use 16 or more, or 0"
    if not samples and stage.best_of != EvaluateConfig().best_of:
        yield no_effect("stage.best_of", stage.best_of, key)
    if samples and stage.optimum:
        yield no_effect("stage.optimum", stage.optimum, f"{key}, which finds another")
    if (samples or stage.optimum) and stage.temperature != 1.0:
        yield (
            f"stage.temperature={stage.temperature}: must be 1.0 with stage.reference_samples or "
            "stage.optimum: KL and optimum are of the policies as they are"
        )


def _evaluation(config: RunConfig, stage: EvaluateConfig) -> Iterator[str]:
    yield from _temperatures("stage.win_temperatures", stage.win_temperatures)
    if stage.prompts == 0:
        yield "stage.prompts=0: nothing to evaluate; use at least 1"
    if stage.policies and config.model.path:
        yield no_effect("model.path", config.model.path, "stage.policies")
    if stage.checkpoints and not (stage.policies or config.model.path):
        yield "stage.checkpoints=true: of which runs? Set stage.policies=[<folder>, ...]"
    if stage.method in NOT_TRAINED:
        yield (
            f"stage.method={stage.method}: a frontier takes these points for {stage.method}, which "
            "it draws in its own way; use another name"
        )
    if min(stage.best_of, default=1) < 1:
        yield f"stage.best_of={stage.best_of}: must be whole numbers of at least 1"
    yield from _optimum(stage)
    yield from _win_rates(config, stage)


def _win_rates(config: RunConfig, stage: EvaluateConfig) -> Iterator[str]:
    if stage.opponent is None:
        if stage.win_temperatures != EvaluateConfig().win_temperatures:
            key, value = "stage.win_temperatures", stage.win_temperatures
            yield no_effect(key, value, "stage.opponent=null")
        if isinstance(config.judge, HttpJudgeConfig):
            yield (
                "judge=http: has no effect with stage.opponent=null; remove it, or set "
                "stage.opponent=chosen (the dataset's first responses)"
            )
        return
    named = stage.opponent
    if "/" not in named and named not in OPPONENTS and not Path(named).exists():
        yield (
            f"stage.opponent={named}: must be chosen, reference or a policy (a folder or a hub id, "
            f"owner/name){did_you_mean(named, OPPONENTS)}"
        )
    if isinstance(config.judge, HttpJudgeConfig):
        try:  # known before hours of sampling
            endpoint_from_environment()
        except ConfigError as error:
            yield str(error)


def _ppo(config: RunConfig, stage: PpoConfig) -> Iterator[str]:
    yield from _rollouts(config, stage)
    if stage.temperature == 0:
        yield "stage.temperature=0.0: must be above 0, PPO explores"
    if config.model.dropout:
        yield (f"model.dropout={config.model.dropout}: must be 0, policy and rollout would differ")
    defaults = PpoConfig()
    if stage.normalise and not stage.normalise_prompts:
        yield "stage.normalise_prompts=0: nothing to measure; use stage.normalise=false"
    if not stage.normalise and stage.normalise_prompts != defaults.normalise_prompts:
        key = "stage.normalise_prompts"
        yield no_effect(key, stage.normalise_prompts, "stage.normalise=false")
    if stage.vf_coef == 0 and stage.value_lr_scale != defaults.value_lr_scale:
        yield no_effect("stage.value_lr_scale", stage.value_lr_scale, "stage.vf_coef=0.0")
    if stage.kl_control == "fixed":
        for name in ("target_kl", "kl_horizon"):
            if getattr(stage, name) != getattr(defaults, name):
                yield no_effect(f"stage.{name}", getattr(stage, name), "stage.kl_control=fixed")


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


def _reward_fn(config: RunConfig) -> Iterator[str]:
    """Only where the stage reads it."""
    chosen, stage = config.reward_fn, config.stage
    if unread(config, "reward_fn"):
        return
    others = [name for name in REWARD_FN_SCHEMAS if name not in (chosen.name, "none")]
    if isinstance(chosen, NoRewardFn):
        yield from _no_reward(config, others)
    generated = isinstance(config.data, SentimentDataConfig) or stage.name == "label"
    if isinstance(chosen, SentimentRewardFn) and not generated:
        yield (
            "reward_fn=sentiment: rates the reviews of data=sentiment, not "
            f"data={config.data.name}; use another: {', '.join(others)}"
        )
    if isinstance(chosen, LexiconRewardFn) and not (
        chosen.path or chosen.positive or chosen.negative
    ):
        yield (
            "reward_fn=lexicon: has no words; set reward_fn.path=<file of word<TAB>valence>, or "
            "reward_fn.positive=[good,...] reward_fn.negative=[bad,...]"
        )
    if chosen.name in ("classifier", "reward_model"):
        path, hub_id = value_at(config, "reward_fn.path"), value_at(config, "reward_fn.hub_id")
        if not (path or hub_id):
            yield f"reward_fn={chosen.name}: which? Set reward_fn.path=<folder of the model>"


def _no_reward(config: RunConfig, others: list[str]) -> Iterator[str]:
    """What takes one, and where it comes from."""
    stage, remedy = config.stage, f"choose one of {', '.join(others)}"
    if not isinstance(stage, EvaluateConfig):
        yield f"reward_fn=none: stage={stage.name} needs a reward; {remedy}"
        return
    if stage.reference_samples or stage.optimum:
        yield f"reward_fn=none: the optimum is that of a reward; {remedy}"
    if stage.opponent is not None and not isinstance(config.judge, HttpJudgeConfig):
        yield (
            f"stage.opponent={stage.opponent}: nothing judges who wins; set judge=http (a language "
            f"model) or reward_fn= ({', '.join(others)})"
        )


def _pairs(config: RunConfig) -> Iterator[str]:
    data, stage = config.data, f"stage={config.stage.name}"
    if data.name == "imdb":
        yield (
            f"data=imdb: has no preference pairs for {stage}; sample and label some first "
            "(stage=sample, stage=label) or use another dataset"
        )
    if isinstance(data, SentimentDataConfig) and data.responses == 1:
        yield f"data.responses=1: {stage} needs at least 2"
    if isinstance(data, JsonlDataConfig) and not (data.rejected_field or data.responses_field):
        yield (
            f"data.rejected_field=null: {stage} needs pairs; name the rejected response's field "
            "or data.responses_field"
        )


def _loss(stage: DpoConfig) -> Iterator[str]:
    """Options that the chosen loss would silently ignore."""
    read = LOSS_OPTIONS.get(stage.loss)
    if read is None:
        return  # reported as an unknown choice
    defaults = {f.name: f.default for f in dataclasses.fields(DpoConfig)}
    for name in sorted(set().union(*LOSS_OPTIONS.values()) - read):
        value = getattr(stage, name)
        if value != defaults[name]:
            yield no_effect(f"stage.{name}", value, f"stage.loss={stage.loss}")
    if stage.loss == "unlikelihood":
        for name in ("reference", "reference_logprobs"):
            value = getattr(stage, name)
            if value != defaults[name]:
                yield no_effect(f"stage.{name}", value, "stage.loss=unlikelihood")
