"""The plan of a recipe: what it costs, what is left of it, and many steps on one screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_cli.config.hydra import job_count
from dpo_cli.workflow import recipe
from dpo_cli.workflow import summary as recipe_report
from dpo_cli.workflow.file import load_recipe
from dpo_cli.workflow.plan import Cost, cost_line, minutes, plan
from dpo_cli.workflow.summary import Outcome, counted
from recipe_helpers import run_cli, starts

pytest_plugins = ["recipe_fixtures"]

STEPS = """
vars: {seeds: [0, 1]}
repeat: {seed: "${vars.seeds}"}
steps:
  - {name: sft, minutes: 3, overrides: {seed: "${repeat.seed}"}}
  - {name: dpo, overrides: {seed: "${repeat.seed}", model.path: "${steps.sft.dir}"}}
  - name: grid
    sweep: true
    minutes: 8.5
    overrides: ["stage=dpo", "seed=${repeat.seed}", "stage.beta=0.1,0.5", "optim.lr=choice(1,2,3)"]
"""
MANY = "vars.seeds=[0,1,2,3,4,5,6]"  # 21 steps: more than a table shows one by one


@pytest.fixture
def here(folder: Path) -> Path:
    (folder / "small.yaml").write_text(STEPS)
    return folder


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capfd.readouterr().out.splitlines()]


def test_the_plan_shows_jobs_and_guessed_minutes(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("dry_run=true") == 0
    out = lines(capfd)
    assert "│ 01-sft-0  │ run   │    1 │      ~3 │" in out
    assert "│ 02-dpo-0  │ run   │    1 │       ? │" in out
    assert "│ 03-grid-1 │ run   │    6 │    ~8.5 │" in out
    assert (
        "time left: ~23 of ~23 minutes; no estimate for 2 of 6 steps; "
        "~: the recipe's estimate, on two CPU cores"
    ) in " ".join(out)
    command = out[out.index("03-grid-1: run") + 1]
    assert command == ("  dpo-run -m stage=dpo seed=1 stage.beta=0.1,0.5 'optim.lr=choice(1,2,3)'")


def test_what_a_step_took_is_measured(here: Path) -> None:
    assert run_cli("vars.seeds=0") == 0
    record = json.loads((here / "runs/small/02-dpo-0.json").read_text())
    assert record["status"] == "done"
    assert 0.0 < record["seconds"] == record["finished_seconds"] < 60.0
    for name, seconds in (("01-sft-0", 90.0), ("02-dpo-0", 30.0)):
        path = here / f"runs/small/{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"finished_seconds": seconds}))
    rows = {
        row.task.label: row.cost
        for row in plan(load_recipe(here / "small.yaml"), Path("runs/small"))
    }
    assert rows["01-sft-0"] == Cost(90.0, 0.0, True)  # to be skipped
    assert rows["01-sft-1"] == Cost(90.0, 90.0, True)  # as seed 0, not as the recipe guesses
    assert rows["02-dpo-1"] == Cost(30.0, 30.0, True)


def test_a_resumed_step_took_the_sum_of_its_starts(here: Path) -> None:
    (here / "stop-sft-0").touch()
    assert run_cli("vars.seeds=0") == 75
    path = here / "runs/small/01-sft-0.json"
    record = json.loads(path.read_text())
    assert record["status"] == "started"
    assert "finished_seconds" not in record
    path.write_text(json.dumps(record | {"seconds": 100.0}))
    (here / "stop-sft-0").unlink()
    starts(here)
    assert run_cli("vars.seeds=0") == 0
    assert starts(here)[0] == "resume sft-0"
    assert 100.0 < json.loads(path.read_text())["finished_seconds"] < 160.0


def test_a_step_that_starts_anew_keeps_the_earlier_time(here: Path) -> None:
    assert run_cli("vars.seeds=0") == 0
    path = here / "runs/small/01-sft-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished_seconds": 120.0}))
    (here / "runs/small/01-sft-0/summary.json").unlink()
    (here / "fail-sft-0").touch()
    assert run_cli("vars.seeds=0") == 3
    record = json.loads(path.read_text())
    assert (record["status"], record["finished_seconds"]) == ("started", 120.0)
    assert record["seconds"] < 60.0


def test_many_steps_are_a_row_for_each_name(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_cli("vars.seeds=0,3") == 0
    starts(here)
    capfd.readouterr()
    assert run_cli(MANY, "dry_run=true") == 0
    out = lines(capfd)
    assert len(out) < 30
    row = next(line for line in out if "03-grid x7" in line)
    assert "2 skip, 5 run" in row
    assert " 42 " in row  # 7 sweeps of 6 jobs
    shown = out.index("03-grid-1: run")
    assert out[shown + 2] == "  and the same for seed=2,4,5,6"


def test_many_outcomes_are_a_row_for_each_name(capsys: pytest.CaptureFixture[str]) -> None:
    def rows(seeds: int) -> list[Outcome]:
        return [
            Outcome(name, f"0{n}-{name}", f"0{n}-{name}-{s}", "", "", action, 90.0, None)
            for s in range(seeds)
            for n, name, action in ((1, "sft", "skip"), (2, "dpo", "run" if s else "resume"))
        ]

    recipe_report.print_outcomes(rows(10))
    assert "│ 02-dpo-9 │ ran     │     1.5 │" in capsys.readouterr().out
    recipe_report.print_outcomes(rows(11))
    out = capsys.readouterr().out
    assert "│ 01-sft x11 │ 11 skipped        │       - │" in out
    assert "│ 02-dpo x11 │ 1 resumed, 10 ran │    16.5 │" in out


def test_facts_are_plain_values(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []
    facts = recipe.facts

    def noted(*arguments: object) -> dict[str, object]:
        seen.append(facts(*arguments))  # type: ignore[arg-type]
        return seen[-1]  # type: ignore[return-value]

    monkeypatch.setattr(recipe, "facts", noted)
    (here / "small.yaml").write_text(STEPS + "report: [{label: ours, step: dpo}]\n")
    assert run_cli() == 0
    found = json.loads(json.dumps(seen[0]))
    assert found["repeat"] == {"seed": [0, 1]}
    assert found["report"] == [
        {"label": "ours", "folders": ["runs/small/02-dpo-0", "runs/small/02-dpo-1"]}
    ]
    step = found["steps"][-1]
    assert 0.0 < step.pop("total_seconds") <= step.pop("seconds")
    assert step == {
        "name": "grid", "step": "03-grid", "label": "03-grid-1", "title": "grid (seed=1)",
        "folder": "runs/small/03-grid-1", "action": "run",
    }  # fmt: skip


def test_sums_of_costs() -> None:
    measured, guess = Cost(90.0, 30.0, True), Cost(120.0, 120.0, False)
    assert minutes([measured, measured]) == "3.0"
    assert minutes([measured, guess]) == "~3.5"
    assert minutes([measured, None]) == "?"
    assert cost_line([measured]) == "time left: 0.5 of 1.5 minutes"
    assert cost_line([None]) == "no estimate for 1 of 1 steps"
    assert counted(["run"]) == "run"
    assert counted(["skip", "run", "skip"]) == "2 skip, 1 run"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=1"], 1),
        (["seed=1,2", "stage=sft", "optim.lr=range(3)"], 6),
        (["seed=1,2", "stage=glob(*)"], None),
    ],
)
def test_the_number_of_jobs(words: list[str], expected: int | None) -> None:
    assert job_count(words) == expected
