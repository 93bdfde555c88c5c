"""The stages: name -> its StageSpec, without importing torch."""

from __future__ import annotations

from dpo_cli.config.stages import (
    dpo,
    evaluate,
    export,
    frontier,
    inspect,
    kto,
    label,
    online_dpo,
    ppo_baseline,
    reward,
    sample,
    sft,
)
from dpo_cli.config.stages.base import StageConfig, StageSpec

STAGES: dict[str, StageSpec] = {
    "sft": sft.SPEC,
    "dpo": dpo.SPEC,
    "kto": kto.SPEC,
    "reward": reward.SPEC,
    "online-dpo": online_dpo.SPEC,
    "ppo-baseline": ppo_baseline.SPEC,
    "sample": sample.SPEC,
    "label": label.SPEC,
    "evaluate": evaluate.SPEC,
    "frontier": frontier.SPEC,
    "export": export.SPEC,
    "inspect": inspect.SPEC,
}
STAGE_SCHEMAS: dict[str, type[StageConfig]] = {name: spec.schema for name, spec in STAGES.items()}


def title_of_stage(name: str, advantage: object) -> str:
    """What pages call training in a stage, with `stage.advantage` if it has one."""
    estimator = ppo_baseline.ADVANTAGES.get(str(advantage))
    if estimator is not None:
        return estimator.title
    spec = STAGES.get(name)
    return spec.title if spec else name


def spec_of(stage: StageConfig) -> StageSpec:
    return STAGES[stage.name]
