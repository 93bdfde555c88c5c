"""No process of ours imports a module from the folder that it was started in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import import_path
from dpo_cli import cli
from dpo_cli.distributed.launch import rank_command
from dpo_cli.workflow.child import child_command

NAMES = ("yaml", "hydra", "omegaconf", "json", "torch", "numpy", "resource", "multiprocessing")
STARTS = {
    "a job of a sweep, a step of a recipe": child_command(),
    "a rank": [sys.executable, *rank_command()],
    "a rank of torchrun": [sys.executable, "-m", "dpo_cli"],
}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose modules leave a mark and end the process."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("open('RAN', 'w'); raise SystemExit(99)\n")
    return tmp_path


def start(folder: Path, command: Sequence[str], env: dict[str, str]) -> None:
    done = subprocess.run(
        [*command, "--cfg", "job"], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "micro_batch_tokens" in done.stdout
    assert not (folder / "RAN").exists()


@pytest.mark.parametrize("kind", STARTS)
def test_the_current_folder_is_no_place_for_modules(
    hostile: Path, clean_env: dict[str, str], kind: str
) -> None:
    start(hostile, STARTS[kind], clean_env | {"PYTHONPATH": import_path()})


def test_nor_is_it_for_processes_that_libraries_start(
    hostile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the compiler's and multiprocessing's."""
    monkeypatch.setattr(sys, "argv", ["dpo-run"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    cli.main(["--cfg", "job"])
    capsys.readouterr()
    code = "import yaml, multiprocessing.resource_tracker"
    subprocess.run([sys.executable, "-c", code], cwd=hostile, env=dict(os.environ), check=True)
    assert not (hostile / "RAN").exists()
