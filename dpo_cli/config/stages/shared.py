"""Data checks shared by several stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpo_cli.config.datasets import JsonlDataConfig, SentimentDataConfig

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
