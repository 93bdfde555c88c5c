"""`dpo-run runs`: finished, stopped and running runs, none of which it changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dpo_cli.cli import main
from dpo_cli.train.guard import run_lock
from dpo_cli.workflow.runs import folders_below, main_figure, state_of
from small_runs import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, one that was stopped after its first save, and one that saved nothing."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "done", "stage=dpo", "train.max_steps=2", "train.save_every_steps=1")
    shutil.copytree(folder / "done", folder / "sweep" / "0")
    stopped = folder / "sweep" / "0"
    (stopped / "summary.json").unlink()
    shutil.rmtree(stopped / "checkpoints" / "step-2")
    shutil.copytree(stopped, folder / "early")
    shutil.rmtree(folder / "early" / "checkpoints")
    return folder


def test_states(root: Path) -> None:
    assert sorted(folders_below(root)) == [root / "done", root / "early", root / "sweep" / "0"]
    assert state_of(root / "done") == "finished"
    assert state_of(root / "sweep" / "0") == "stopped, saved at step 1"
    assert state_of(root / "early") == "stopped, nothing saved"
    with run_lock(root / "early"):
        assert state_of(root / "early") == "running"
    assert state_of(root / "early") == "stopped, nothing saved"


def test_the_table(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))
    main(["runs", str(root)])
    assert sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*")) == before
    out = capsys.readouterr().out
    assert f"3 runs below {root}" in out
    (line,) = [line for line in out.splitlines() if " done " in line]
    assert "finished" in line
    assert "dpo" in line
    assert "Held-out" in line


@pytest.mark.parametrize(
    ("summary", "figure"),
    [
        ({}, "-"),
        ({"loss": 0.5}, "Loss 0.500"),
        (
            {"loss": 0.5, "accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8},
            "Preference accuracy 75.0% (70.0% to 80.0%)",
        ),
        (
            {"kl": 2.5, "loss": 0.5, "kl_se": 0.1},
            "KL to the reference (nats) 2.500\u00a0±\u00a00.100",
        ),
    ],
)
def test_the_main_figure(summary: dict[str, float], figure: str) -> None:
    assert main_figure(summary) == figure


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["runs", str(tmp_path / "x")])
    assert ended.value.code == 2
    assert "no such folder" in capsys.readouterr().err
    main(["runs", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path}: no runs\n"
