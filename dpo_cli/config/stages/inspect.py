"""Inspection of the rows: its keys."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.config.keys import at_least, key
from dpo_cli.config.stages.base import StageConfig, StageSpec


@dataclass
class InspectConfig(StageConfig):
    """Shows examples token by token, length percentiles and dropped rows."""

    name: str = key("inspect", "which stage")
    examples: int = key(3, "examples to print", bound=at_least(1, 10**6))
    split: str = key("train", "split of the examples", choices=("train", "eval"))


SPEC = StageSpec(InspectConfig, title="Rows", parallel=False, keeps_folder=False)
