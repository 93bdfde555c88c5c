"""The stages: name -> module whose `run(session)` does the work."""

from __future__ import annotations

from importlib import import_module

from dpo_cli.config import STAGES
from dpo_cli.session.session import Stage


def load_stage(name: str) -> Stage:
    assert name in STAGES
    module = name.replace("-", "_")
    return import_module(f"dpo_cli.stages.{module}").run
