"""A recipe's sweep that was killed goes on: what is done stays, what has a checkpoint resumes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from dpo_cli.workflow import child as launch
from dpo_cli.workflow.state import identity
from dpo_cli.workflow.sweep import decide_job
from recipe_helpers import run_cli, starts

pytest_plugins = ["recipe_fixtures"]
ROOT = Path(launch.__file__).parents[1]

# Stands in for `dpo-run`: a sweep is a real one, its jobs are stubs. A file `<how>-<seed>` in
# the current folder has a job do that once:
#   dies     it saves a checkpoint and is killed           fails   it ends with exit code 3
#   all      it saves a checkpoint, then it and the sweep are killed
#   half     the same, with rows half written and no checkpoint
#   whole    all its files are there, then it and the sweep are killed
#   early    the sweep is killed before the job has written anything
STUB = """
import json, os, pathlib, signal, sys
words = sys.argv[1:]
if "-m" in words:
    from dpo_cli import cli
    from dpo_cli.workflow import child as launch
    launch.child_command = lambda: [sys.executable, __file__]
    sys.argv = ["dpo-run"]
    cli.main(words)
    sys.exit()
values = dict(word.split("=", 1) for word in words)
resume = "resume" in values
folder = pathlib.Path(values.get("resume") or values["run_dir"].strip("'"))
stored = folder / ".hydra/overrides.yaml"
seed = values["seed"] if not resume else json.loads(stored.read_text())[0].partition("=")[2]
with open("starts.txt", "a") as file:
    print("resume" if resume else "run", seed, file=file)

def asked(how):
    path = pathlib.Path(f"{how}-{seed}")
    there = path.exists()
    path.unlink(missing_ok=True)
    return there

def kill(*numbers):
    for number in numbers:
        os.kill(number, signal.SIGKILL)

if asked("early"):
    kill(os.getppid(), os.getpid())
assert resume == (folder / "checkpoints/step-1").is_dir()
if not resume:
    folder.mkdir(exist_ok=True)
    assert {path.name for path in folder.iterdir()} <= {".hydra"}
    stored.parent.mkdir(exist_ok=True)
    stored.write_text(json.dumps(words))
if asked("half"):
    (folder / "samples.jsonl").write_text('{"pro')
    kill(os.getppid(), os.getpid())
if asked("fails"):
    sys.exit(3)
dies, all_die = asked("dies"), asked("all")
if dies or all_die:
    (folder / "checkpoints/step-1").mkdir(parents=True)
    kill(*[os.getppid()] * all_die, os.getpid())
(folder / "summary.json").write_text(json.dumps({"stage": "sft", "loss": float(seed)}))
if asked("whole"):
    kill(os.getppid(), os.getpid())
"""

RECIPE = """
steps:
  - {name: grid, sweep: true, overrides: ["seed=1,2,3", "stage=sft"], minutes: 6}
  - {name: last, overrides: {seed: 4, model.path: "${steps.grid.dir}/0"}}
"""
GRID = "runs/small/01-grid"


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stub.py").write_text(STUB)
    (folder / "small.yaml").write_text(RECIPE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    return folder


def jobs(folder: Path) -> dict[str, int]:
    """seed -> exit code."""
    records = (json.loads(path.read_text()) for path in (folder / GRID / "jobs").glob("*.json"))
    return {record["overrides"]["seed"]: record["exit_code"] for record in records}


def all_done(folder: Path) -> bool:
    summaries = [folder / GRID / str(job) / "summary.json" for job in range(3)]
    losses = [json.loads(path.read_text())["loss"] for path in summaries]
    rows = (folder / GRID / "sweep.csv").read_text().splitlines()
    return losses == [1, 2, 3] and jobs(folder) == {"1": 0, "2": 0, "3": 0} and len(rows) == 4


KILLED = 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("how", "recorded", "then", "aside"),
    [
        ("all", {"1": 0}, ["resume 2", "run 3"], False),
        pytest.param("half", {"1": 0}, ["run 2", "run 3"], True, marks=pytest.mark.slow),
        ("whole", {"1": 0}, ["run 2", "run 3"], True),  # nobody saw it end well
        ("early", {"1": 0}, ["run 2", "run 3"], False),
    ],
)
def test_a_killed_sweep_goes_on(
    how: str, recorded: dict[str, int], then: list[str], aside: bool, here: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (here / f"{how}-2").touch()
    assert run_cli() == KILLED
    assert starts(here) == ["run 1", "run 2"]
    assert jobs(here) == recorded
    capfd.readouterr()
    assert run_cli() == 0
    assert starts(here) == [*then, "run 4"]
    assert all_done(here)
    assert (here / GRID / "old/1-1").is_dir() == aside
    out = capfd.readouterr().out
    assert "grid: resume (its sweep did not finish, jobs done: 1)" in out
    assert "[job 0] seed=1 stage=sft" in out
    assert ": finished earlier" in out
    assert run_cli() == 0
    assert starts(here) == []
    assert not list(here.glob("runs/small/01-grid.old*"))


@pytest.mark.parametrize(
    ("how", "code", "then"), [("dies", KILLED, ["resume 2"]), ("fails", 3, ["run 2"])]
)
def test_only_the_jobs_that_failed_run_again(
    how: str, code: int, then: list[str], here: Path
) -> None:
    (here / f"{how}-2").touch()
    assert run_cli() == code
    assert starts(here) == ["run 1", "run 2", "run 3"]
    assert run_cli() == 0
    assert starts(here) == [*then, "run 4"]
    assert all_done(here)


def test_a_job_whose_outputs_were_touched_is_not_done(here: Path) -> None:
    (here / "early-3").touch()
    assert run_cli() == KILLED
    (here / GRID / "0/summary.json").write_text("{}")
    starts(here)
    assert run_cli() == 0
    assert starts(here) == ["run 1", "run 3", "run 4"]
    assert all_done(here)


def test_a_sweep_with_other_words_starts_anew(here: Path) -> None:
    (here / "all-2").touch()
    assert run_cli() == KILLED
    starts(here)
    (here / "small.yaml").write_text(RECIPE.replace("seed=1,2,3", "seed=2,3"))
    assert run_cli() == 0
    assert starts(here) == ["run 2", "run 3", "run 4"]
    assert (here / "runs/small/01-grid.old-1/0/summary.json").is_file()


def test_the_plan_counts_the_jobs_that_are_left(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "all-2").touch()
    run_cli()
    capfd.readouterr()
    assert run_cli("dry_run=true") == 0
    out = capfd.readouterr().out
    assert "time left: ~4 of ~6 minutes; no estimate for 1 of 2 steps" in out
    assert "│ 01-grid │ resume │    3 │      ~6 │" in out


def test_a_sweep_by_hand_goes_on_with_the_same_words_only(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "all-2").touch()
    assert run_cli() == KILLED
    capfd.readouterr()
    stub = [sys.executable, "../stub.py", "-m"]
    place = [f"hydra.sweep.dir={GRID}", "resume=true"]

    def code(*words: str) -> int:
        import subprocess

        return subprocess.run([*stub, *words], check=False).returncode

    assert code("seed=1,2", "stage=sft", *place) == 2
    assert "was started with seed=1,2,3 stage=sft; use the same" in capfd.readouterr().err
    assert code("seed=1,2,3", "stage=sft", f"hydra.sweep.dir={GRID}") == 2
    assert "is not empty; choose another folder" in capfd.readouterr().err
    assert code("seed=1", "hydra.sweep.dir=none", "resume=true") == 2
    assert "hydra.sweep.dir=none is not the folder of a sweep" in capfd.readouterr().err
    starts(here)
    assert code("seed=1,2,3", "stage=sft", *place) == 0
    assert starts(here) == ["resume 2", "run 3"]
    assert all_done(here)


def test_what_is_left_of_a_job(tmp_path: Path) -> None:
    run_dir, words = tmp_path / "0", ["seed=1", "stage.beta=0.1"]
    (run_dir / "checkpoints/step-1").mkdir(parents=True)
    failed = {"overrides": {"seed": "1", "stage.beta": "0.1"}, "exit_code": -9}
    assert decide_job({}, words, run_dir).action == "run"  # how it was started is not known
    (run_dir / ".hydra").mkdir()
    stored = run_dir / ".hydra/overrides.yaml"
    stored.write_text('["seed=1", "stage.beta=0.2", "run_dir=x"]')
    assert decide_job(failed, words, run_dir).action == "run"  # another job's checkpoint
    stored.write_text('["seed=1", "stage.beta=0.1", "run_dir=x"]')
    assert decide_job(failed, words, run_dir).action == "resume"
    assert decide_job({}, words, run_dir).action == "resume"
    done = failed | {"exit_code": 0, "outputs": "of another time"}
    assert decide_job(done, words, run_dir).action == "run"
    done["outputs"] = identity(run_dir)
    assert decide_job(done, words, run_dir).action == "skip"
    assert decide_job(done, ["seed=2", "stage.beta=0.1"], run_dir).action == "run"
    del done["outputs"]  # a record without them tells nothing
    assert decide_job(done, words, run_dir).action == "run"
