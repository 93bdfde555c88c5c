"""Export of a model: its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dpo_cli.config.keys import key
from dpo_cli.config.stages.base import StageConfig, StageSpec

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig


@dataclass
class ExportConfig(StageConfig):
    """The model as a dense Hugging Face folder, with a merged adapter, in the requested dtype."""

    name: str = key("export", "which stage")
    dtype: str = key(
        "auto", "of the weights: auto (that of the stored base; bf16 for a qlora or int8 run) | "
        "bf16 | fp32", choices=("auto", "bf16", "fp32"),
    )  # fmt: skip
    push_to_hub: str | None = key(
        None, "owner/name: also upload the folder to this private model repository"
    )


def problems(config: RunConfig) -> Iterator[str]:
    if not (config.model.path or config.model.hub_id):
        yield "stage=export: nothing to export; set model.path=<folder of a run>"
    repo = cast(ExportConfig, config.stage).push_to_hub
    if repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        yield f"stage.push_to_hub={repo}: must be owner/name"


SPEC = StageSpec(
    ExportConfig,
    title="Export",
    method="training that its folder does not record",
    reads_rows=False,
    parallel=False,
    problems=problems,
)
