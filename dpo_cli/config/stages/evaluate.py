"""Evaluation: its keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dpo_cli.config.keys import LOCAL, LOCAL_OR_HUB, at_least, heat, key
from dpo_cli.config.rewards import REWARD_FN_SCHEMAS, HttpJudgeConfig, NoRewardFn
from dpo_cli.config.spelling import did_you_mean
from dpo_cli.config.stages.base import (
    StageConfig,
    StageSpec,
    bad_temperatures,
    changed,
    decoded_together_key,
    new_tokens_key,
    no_effect,
)
from dpo_cli.config.stages.shared import unreachable_judge

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig

NOT_TRAINED = ("optimum", "best-of-n")  # methods of an evaluation's additional points
OPPONENTS = ("chosen", "reference")

CPU_BATCH = 64


@dataclass
class EvaluateConfig(StageConfig):
    """Reward, sequence KL to the reference, frontier, win rates of one policy or several."""

    name: str = key("evaluate", "which stage")
    policies: list[str] = key([], "folders of runs or of whole sweeps; []: model.path", path=LOCAL)
    checkpoints: bool = key(False, "evaluate every checkpoint of each run as well")
    method: str | None = key(None, "name of these policies in a frontier; null: their stage")
    reference: str | None = key(
        None, "folder or hub id of the reference of the KL; null: the one the policy was trained "
        "against", path=LOCAL_OR_HUB,
    )  # fmt: skip
    pairs: str | None = key(
        None, "file of labeled pairs for preference accuracy; null: the held-out rows, if pairs",
        path=LOCAL,
    )  # fmt: skip
    allow_trained: bool = key(
        False, "held-out rows that a policy or reward model was trained on; false: an error, true: "
        "their fraction is reported",
    )  # fmt: skip
    prompts: int = key(256, "held-out prompts", bound=at_least(0, 10**6))
    completions: int = key(1, "per prompt", bound=at_least(1, 10**5))
    temperature: float = key(1.0, "of sampling", bound=heat())
    max_new_tokens: int | None = new_tokens_key()
    batch_size: int | None = decoded_together_key(CPU_BATCH)
    reference_samples: int = key(
        0, "reference samples per prompt, for the optimum and best-of-N; 0: neither",
        bound=at_least(0, 10**5),
    )  # fmt: skip
    best_of: list[int] = key([1, 4, 16, 64, 128], "N of best-of-N", bound=at_least(1, 10**5))
    optimum: str | None = key(
        None, "folder of an evaluation with stage.reference_samples, to report the gap to its "
        "optimum", path=LOCAL,
    )  # fmt: skip
    opponent: str | None = key(
        None, "opponent in win rates: chosen (the dataset's response) | reference | a folder or "
        "hub id", path=LOCAL_OR_HUB,
    )  # fmt: skip
    win_temperatures: list[float] = key([1.0], "of the policy, for win rates", bound=heat())


def problems(config: RunConfig) -> Iterator[str]:
    stage = cast(EvaluateConfig, config.stage)
    yield from bad_temperatures("stage.win_temperatures", stage.win_temperatures)
    if stage.prompts == 0:
        yield "stage.prompts=0: nothing to evaluate; use at least 1"
    if stage.policies and config.model.path:
        yield no_effect("model.path", config.model.path, "stage.policies")
    if stage.checkpoints and not (stage.policies or config.model.path):
        yield "stage.checkpoints=true: needs runs; set stage.policies=[<folder>, ...]"
    if stage.method in NOT_TRAINED:
        yield (
            f"stage.method={stage.method}: reserved for the points of {stage.method} in a "
            "frontier; use another name"
        )
    yield from _optimum(stage)
    yield from _win_rates(config, stage)
    if isinstance(config.reward_fn, NoRewardFn):
        yield from _no_reward(config, stage)


def _optimum(stage: EvaluateConfig) -> Iterator[str]:
    samples, setting = stage.reference_samples, f"stage.reference_samples={stage.reference_samples}"
    if 0 < samples < 16:
        yield f"{setting}: too few to estimate the optimum; use 16 or more, or 0"
    if not samples:
        for name, value in changed(stage, ["best_of"]):
            yield no_effect(name, value, setting)
    if samples and stage.optimum:
        yield no_effect("stage.optimum", stage.optimum, f"{setting}, which computes the optimum")
    if (samples or stage.optimum) and stage.temperature != 1.0:
        yield (
            f"stage.temperature={stage.temperature}: must be 1.0 with stage.reference_samples or "
            "stage.optimum, whose KL is that of untempered policies"
        )


def _no_reward(config: RunConfig, stage: EvaluateConfig) -> Iterator[str]:
    """Problems of measurements that need a reward."""
    others = ", ".join(name for name in REWARD_FN_SCHEMAS if name != "none")
    if stage.reference_samples or stage.optimum:
        yield f"reward_fn=none: the optimum needs a reward; choose one of {others}"
    if stage.opponent is not None and not isinstance(config.judge, HttpJudgeConfig):
        yield (
            f"stage.opponent={stage.opponent}: win rates need a judge; set judge=http (a language "
            f"model) or reward_fn= ({others})"
        )


def _win_rates(config: RunConfig, stage: EvaluateConfig) -> Iterator[str]:
    if stage.opponent is None:
        for name, value in changed(stage, ["win_temperatures"]):
            yield no_effect(name, value, "stage.opponent=null")
        if isinstance(config.judge, HttpJudgeConfig):
            yield (
                "judge=http: has no effect with stage.opponent=null; remove it, or set "
                "stage.opponent=chosen (the dataset's first responses)"
            )
        return
    opponent = stage.opponent
    if "/" not in opponent and opponent not in OPPONENTS and not os.path.exists(opponent):
        yield (
            f"stage.opponent={opponent}: must be chosen, reference or a policy (a folder or a hub "
            f"id, owner/name){did_you_mean(opponent, OPPONENTS)}"
        )
    yield from unreachable_judge(config)


SPEC = StageSpec(
    EvaluateConfig,
    title="Evaluation",
    reference=lambda stage: True,
    reported=True,
    reads=("reward_fn", "judge"),
    reward_optional=True,
    cpu_batch_size=CPU_BATCH,
    problems=problems,
)
