"""Fixtures for tests of the command line; loaded through `pytest_plugins`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli_helpers import Starts
from dpo_cli.config import RunConfig


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it: have it undone
    return folder


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    """What would have been run: stands in for `dpo_cli.run`, which imports torch."""
    seen: Starts = []

    def run(config: RunConfig, argv: list[str]) -> dict[str, float]:
        seen.append((config, argv))
        Path(config.run_dir, "config.yaml").write_text("{}")
        Path(config.run_dir, "metrics.jsonl").write_text('{"step": 1}\n')
        return {}

    monkeypatch.setitem(sys.modules, "dpo_cli.run", SimpleNamespace(run=run))  # type: ignore[arg-type]
    return seen
