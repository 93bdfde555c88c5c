"""Fixtures for tests of recipes; loaded through `pytest_plugins`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dpo_cli.workflow import child as launch
from recipe_helpers import RECIPE, STUB


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with recipe.yaml, and the stub in the place of `dpo-run`."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    folder = tmp_path / "cwd"
    folder.mkdir()
    (folder / "small.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launch, "child_command", lambda: [sys.executable, str(script)])
    return folder
