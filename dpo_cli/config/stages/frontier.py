"""Frontiers of several evaluations: their keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dpo_cli.config.keys import LOCAL, key
from dpo_cli.config.stages.base import StageConfig, StageSpec

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig


@dataclass
class FrontierConfig(StageConfig):
    """Plots several evaluations together: reward against KL, and the optimum."""

    name: str = key("frontier", "which stage")
    evaluations: list[str] = key([], "folders of stage=evaluate runs", path=LOCAL)


def problems(config: RunConfig) -> Iterator[str]:
    if not cast(FrontierConfig, config.stage).evaluations:
        yield "stage.evaluations=[]: nothing to plot; give folders of stage=evaluate runs"


SPEC = StageSpec(
    FrontierConfig,
    title="Frontier of reward and KL",
    reads_model=False,
    reads_rows=False,
    parallel=False,
    reported=True,
    problems=problems,
)
