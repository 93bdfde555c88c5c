"""Recipes whose steps repeat: order, folders, references, what is skipped and averaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_cli.workflow.summary import averaged
from recipe_helpers import run_cli, starts

pytest_plugins = ["recipe_fixtures"]

# A once-step before, between and after the repeated ones: two blocks.
REPEATED = """
vars: {seeds: [0, 1], rows: 8}
repeat: {seed: "${vars.seeds}"}
steps:
  - name: base
    once: true
    overrides: {stage: sft, train.max_steps: "${vars.rows}"}
  - name: sft
    overrides: {stage: sft, model.path: "${steps.base.dir}", seed: "${repeat.seed}"}
  - name: dpo
    overrides: ["stage=dpo", "model.path=${steps.sft.dir}", "seed=${repeat.seed}"]
  - name: middle
    once: true
    overrides: {stage: evaluate, stage.policies: "${steps.dpo.dirs}"}
  - name: score
    overrides: {stage: evaluate, model.path: "${steps.dpo.dir}", cache_dir: "c ${repeat.seed}"}
  - name: all
    once: true
    overrides:
      stage: frontier
      stage.evaluations: ["${steps.score.dirs}", "${steps.middle.dir}"]
report:
  - {label: one, step: middle}
  - {label: each, step: score}
"""


@pytest.fixture
def here(folder: Path) -> Path:
    (folder / "small.yaml").write_text(REPEATED)
    return folder


def words(folder: Path, label: str) -> list[str]:
    return [str(w) for w in json.loads((folder / "runs/small" / label / "words.json").read_text())]


ORDER = [
    "run base", "run sft-0", "run dpo-0", "run sft-1", "run dpo-1", "run middle",
    "run score-0", "run score-1", "run all",
]  # fmt: skip


def test_blocks_run_for_each_value_with_their_own_folders(here: Path) -> None:
    assert run_cli() == 0
    assert starts(here) == ORDER
    base = "runs/small"
    assert sorted(p.name for p in (here / base).iterdir() if p.is_dir()) == [
        "01-base", "02-sft-0", "02-sft-1", "03-dpo-0", "03-dpo-1", "04-middle",
        "05-score-0", "05-score-1", "06-all",
    ]  # fmt: skip
    assert words(here, "03-dpo-1") == [
        "stage=dpo", f"model.path={base}/02-sft-1", "seed=1", f"run_dir={base}/03-dpo-1",
    ]  # fmt: skip
    assert words(here, "02-sft-1")[1] == f"model.path={base}/01-base"
    assert words(here, "05-score-1")[2] == "cache_dir='c 1'"
    assert words(here, "04-middle")[1] == f"stage.policies=[{base}/03-dpo-0,{base}/03-dpo-1]"
    assert words(here, "06-all")[1] == (
        f"stage.evaluations=[{base}/05-score-0,{base}/05-score-1,{base}/04-middle]"
    )


def test_more_values_leave_the_finished_ones_alone(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("vars.seeds=0") == 0
    starts(here)
    capfd.readouterr()
    assert run_cli("vars.seeds=0,2") == 0
    assert starts(here) == [
        "run sft-2", "run dpo-2", "run middle", "run score-2", "run all",
    ]  # fmt: skip
    out = capfd.readouterr().out
    assert "[2/9] sft (seed=0): skip (finished earlier with the same inputs)" in out
    assert "[4/9] sft (seed=2): run\n" in out
    assert "[6/9] middle: run (again, now stage.policies=" in out


def test_a_failing_value_is_named_and_taken_up_again(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "stop-dpo-1").touch()
    assert run_cli() == 75
    assert starts(here) == ORDER[:5]
    told = "step dpo (seed=1) ended with exit code 75; to continue, run the same command again: "
    assert told in capfd.readouterr().err
    (here / "stop-dpo-1").unlink()
    (here / "value-sft-0").write_text("0.7")
    assert run_cli("vars.rows=9") == 0  # base changes nothing that it writes
    assert starts(here) == ["run base", "resume dpo-1", *ORDER[5:]]


def test_only_what_depends_on_a_changed_value_runs_again(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli() == 0
    starts(here)
    (here / "runs/small/02-sft-1/samples.jsonl").unlink()
    (here / "value-sft-1").write_text("0.7")
    capfd.readouterr()
    assert run_cli("dry_run=true") == 0
    out = capfd.readouterr().out
    assert "02-sft-1: run (again, its outputs were changed or removed)" in out
    assert "03-dpo-1: run (after sft (seed=1))" in out
    assert "03-dpo-0: skip" in out
    assert "06-all: run (after middle, score (seed=1))" in out
    assert run_cli() == 0
    assert starts(here) == ["run sft-1", "run dpo-1"]  # which comes out the same
    assert "dpo (seed=1): run (again, sft (seed=1) has changed)" in capfd.readouterr().out
    assert (here / "runs/small/02-sft-1.old-1/summary.json").is_file()


def test_the_report_averages_over_the_values(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "value-score-1").write_text("0.9")
    assert run_cli() == 0
    out = capfd.readouterr().out
    assert "\nmean ± standard deviation (2 seeds)\n" in out
    assert "0.7 ± 0.28" in out  # 0.5 and 0.9: sqrt(2 * 0.2^2 / 1)
    assert "by score-0 [reward 0.500]" in out
    assert "by score-1" not in out


def test_averages() -> None:
    assert averaged([0.5]) == 0.5
    assert averaged([3, 3]) == 3
    assert averaged([1.0, 2.0, 3.0]) == "2 ± 1"
    assert averaged([1.0, None, 2.0]) == "1.5 ± 0.71 (2)"
    assert averaged([1.0, None]) == "1 (1)"
    assert averaged(["a", "a"]) == "a"
    assert averaged(["a", "b"]) is None
    assert averaged([None, None]) is None


def test_a_mistake_of_one_value_names_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("vars.seeds=[0,x]") == 2
    assert starts(here) == []
    told = "error: steps sft (seed=x), dpo (seed=x): seed=x: expected a whole number\n"
    assert capsys.readouterr().err == told


def test_a_mistake_of_all_values_is_told_once(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "small.yaml").write_text(REPEATED.replace('stage=dpo"', 'stage=dop"'))
    assert run_cli() == 2
    err = capsys.readouterr().err
    assert err.count("stage=dop") == 1
    assert err.startswith("error: step dpo: stage=dop: unknown option")


SWEPT = """
repeat: {seed: [0, 1]}
steps:
  - {name: sft, overrides: {seed: "${repeat.seed}"}}
  - name: grid
    sweep: true
    overrides: ["stage=dpo", "model.path=${steps.sft.dir}", "seed=${repeat.seed}",
                "stage.beta=0.1,0.5"]
"""


def test_a_sweep_inside_a_repeat(here: Path) -> None:
    (here / "small.yaml").write_text(SWEPT)
    assert run_cli() == 0
    assert starts(here) == ["run sft-0", "run grid-0", "run sft-1", "run grid-1"]
    assert words(here, "02-grid-1") == [
        "-m", "stage=dpo", "model.path=runs/small/01-sft-1", "seed=1", "stage.beta=0.1,0.5",
        "hydra.sweep.dir=runs/small/02-grid-1",
    ]  # fmt: skip
