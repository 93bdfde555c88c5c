"""The stages: name -> module that does the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Protocol, cast

from dpo_cli.config import STAGES
from dpo_cli.session.preview import Preview, Row
from dpo_cli.session.session import Session


class StageModule(Protocol):
    """What the module of a stage holds; one that trains or samples also
    `workload(config, splits) -> Workload`, for the memory plan."""

    def run(self, session: Session) -> dict[str, Any]:
        """Do the work; the figures for summary.json."""

    def plan(self, preview: Preview) -> Iterable[Row]:
        """The lines of a dry run. Raises what `run` would raise before it loads weights."""


def stage_module(name: str) -> StageModule:
    assert name in STAGES
    return cast(StageModule, import_module(f"dpo_cli.stages.{name.replace('-', '_')}"))


def load_stage(name: str) -> Callable[[Session], dict[str, Any]]:
    return stage_module(name).run
