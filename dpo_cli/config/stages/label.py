"""Labeling of sampled completions: its keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dpo_cli.config.keys import LOCAL, LOCAL_OR_HUB, above, heat, key, within
from dpo_cli.config.stages.base import StageConfig, StageSpec, changed, no_effect

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig


@dataclass
class LabelConfig(StageConfig):
    """Pairs of sampled completions, labeled by a reward, written to train.jsonl and eval.jsonl."""

    name: str = key("label", "which stage")
    samples: str | None = key(None, "folder of a stage=sample run", path=LOCAL)
    by: str = key(
        "reward_fn", "reward_fn: the reward of that group | implicit: DPO's implicit reward",
        choices=("reward_fn", "implicit"),
    )  # fmt: skip
    reference: str | None = key(
        None, "of stage.by=implicit: folder or hub id; null: that of the policy's training",
        path=LOCAL_OR_HUB,
    )  # fmt: skip
    beta: float = key(
        0.1, "of stage.by=implicit: reward = beta log(pi / pi_ref)", bound=above(0, 1e6)
    )
    labels: str = key(
        "deterministic", "deterministic: the higher reward wins | bradley_terry: sampled",
        choices=("deterministic", "bradley_terry"),
    )  # fmt: skip
    temperature: float = key(
        1.0,
        "of bradley_terry: P(a > b) = sigmoid((r_a - r_b) / temperature)",
        bound=heat(),
    )
    flip_rate: float = key(0.0, "fraction of labels flipped afterwards", bound=within("[0, 1]"))


def problems(config: RunConfig) -> Iterator[str]:
    stage = cast(LabelConfig, config.stage)
    if stage.samples is None:
        yield "stage.samples=null: nothing to label; give the folder of a stage=sample run"
    if stage.temperature == 0:
        yield "stage.temperature=0.0: must be above 0; use stage.labels=deterministic"
    if stage.labels == "deterministic" and stage.temperature != 1.0:
        yield no_effect("stage.temperature", stage.temperature, "stage.labels=deterministic")
    if stage.by == "reward_fn":
        for name, value in changed(stage, ["reference", "beta"]):
            yield no_effect(name, value, "stage.by=reward_fn")
    if stage.by == "implicit" and not (config.model.path or config.model.hub_id):
        yield "stage.by=implicit: needs a policy; set model.path=<folder>"


SPEC = StageSpec(
    LabelConfig,
    title="Preference labels",
    reads_model=False,
    reads_rows=False,
    reads=("reward_fn",),
    problems=problems,
)
