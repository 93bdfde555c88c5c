"""Sampling: its keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dpo_cli.config.keys import at_least, heat, key, within
from dpo_cli.config.stages.base import (
    StageConfig,
    StageSpec,
    bad_temperatures,
    decoded_together_key,
    new_tokens_key,
    no_effect,
)

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig

CPU_BATCH = 64


@dataclass
class SampleConfig(StageConfig):
    """Completions of the dataset's prompts, written to train.jsonl and eval.jsonl."""

    name: str = key("sample", "which stage")
    prompts: int | None = key(None, "training prompts; null: all, 0: none", bound=at_least(0))
    eval_prompts: int | None = key(None, "held-out prompts; null: all, 0: none", bound=at_least(0))
    completions: int = key(4, "per prompt and temperature", bound=at_least(1, 10**5))
    temperatures: list[float] = key(
        [1.0],
        "one output row per prompt and temperature; 0: greedy, one completion",
        bound=heat(),
    )
    top_p: float = key(1.0, "nucleus sampling", bound=within("(0, 1]"))
    max_new_tokens: int | None = new_tokens_key()
    batch_size: int | None = decoded_together_key(CPU_BATCH)


def problems(config: RunConfig) -> Iterator[str]:
    stage = cast(SampleConfig, config.stage)
    yield from bad_temperatures("stage.temperatures", stage.temperatures)
    if stage.prompts == 0 and stage.eval_prompts == 0:
        yield "stage.prompts=0, stage.eval_prompts=0: nothing to sample; use at least 1 of either"
    if stage.top_p < 1 and not any(stage.temperatures):
        yield no_effect("stage.top_p", stage.top_p, f"stage.temperatures={stage.temperatures}")


SPEC = StageSpec(SampleConfig, title="Completions", cpu_batch_size=CPU_BATCH, problems=problems)
