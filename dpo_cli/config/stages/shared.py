"""Checks shared by several stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpo_cli.config.datasets import JsonlDataConfig, SentimentDataConfig
from dpo_cli.config.endpoint import endpoint_from_environment
from dpo_cli.config.rewards import HttpJudgeConfig
from dpo_cli.errors import ConfigError

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig


def unpaired(config: RunConfig) -> Iterator[str]:
    """Problems of data without preference pairs."""
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
            f"data.rejected_field=null: {stage} needs pairs; set it to the rejected response's "
            "field, or set data.responses_field"
        )


def unreachable_judge(config: RunConfig) -> Iterator[str]:
    """Why the judge's address cannot be used, which is known before hours of sampling."""
    if isinstance(config.judge, HttpJudgeConfig):
        try:
            endpoint_from_environment()
        except ConfigError as error:
            yield str(error)
