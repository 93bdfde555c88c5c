"""Recipes: order, references between steps, what is skipped, rerun, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_cli.train.guard import run_lock
from dpo_cli.workflow import state as recipe_state
from recipe_helpers import run_cli, starts

pytest_plugins = ["recipe_fixtures"]

ALL = ["run sft", "run dpo", "run score"]
HERE = "run_dir=runs/small"  # where the first run went by itself


def test_steps_run_in_order_with_their_references(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli() == 0
    assert starts(folder) == ALL
    base = "runs/small"
    assert json.loads((folder / base / "01-sft/words.json").read_text()) == [
        "stage=sft", "train.max_steps=8", "optim.lr=0.001", f"run_dir={base}/01-sft",
    ]  # fmt: skip
    assert json.loads((folder / base / "02-dpo/words.json").read_text()) == [
        "stage=dpo", f"model.path={base}/01-sft", r"logger.wandb_project='it\'s, so'",
        f"run_dir={base}/02-dpo",
    ]  # fmt: skip
    assert json.loads((folder / base / "03-score/words.json").read_text())[1:3] == [
        f"model.path={base}/02-dpo",
        f"stage.reference={base}/01-sft",
    ]
    out = capfd.readouterr().out
    assert "reward" in out
    assert "by score [reward 0.500]" in out


def test_finished_steps_are_skipped(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_cli() == 0
    starts(folder)
    capfd.readouterr()
    assert run_cli() == 0
    assert starts(folder) == []
    out = capfd.readouterr().out
    assert "[1/3] sft: skip (finished earlier with the same inputs)" in out
    assert "by score [reward 0.500]" in out  # the report comes all the same


def test_a_changed_variable_reruns_what_depends_on_it(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_cli()
    starts(folder)
    (folder / "value-sft").write_text("0.7")
    assert run_cli("vars.rows=9", HERE) == 0
    assert starts(folder) == ALL
    out = capfd.readouterr().out
    assert "sft: run (again, now train.max_steps=9, no longer train.max_steps=8)" in out
    assert "dpo: run (again, sft has changed)" in out
    assert (folder / "runs/small/01-sft.old-1/summary.json").is_file()
    (folder / "value-sft").write_text("0.8")
    assert run_cli(HERE) == 0  # back again: nothing is thrown away
    assert sorted(p.name for p in (folder / "runs/small").glob("01-sft*")) == [
        "01-sft", "01-sft.json", "01-sft.old-1", "01-sft.old-2",
    ]  # fmt: skip


def test_a_step_whose_inputs_come_out_the_same_is_not_repeated(folder: Path) -> None:
    run_cli()
    starts(folder)
    assert run_cli("vars.rows=9", HERE) == 0  # the stub writes the same summary
    assert starts(folder) == ["run sft"]


def test_other_variables_have_a_folder_of_their_own(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first run's models and its report stay as they are."""
    run_cli()
    first = {p: p.read_bytes() for p in (folder / "runs/small").rglob("*") if p.is_file()}
    (folder / "value-sft").write_text("0.7")
    assert run_cli("vars.rows=9") == 0
    assert "runs/small has other variables; writing to runs/small-2" in capfd.readouterr().out
    assert {p: p.read_bytes() for p in first} == first
    assert (folder / "runs/small-2/report.html").is_file()
    starts(folder)
    assert run_cli("vars.rows=9") == 0  # goes on where it was
    assert run_cli() == 0
    assert starts(folder) == []
    assert run_cli("vars.rows=10") == 0
    assert (folder / "runs/small-3/report.html").is_file()


def test_a_report_of_steps_that_run_anew_is_kept(folder: Path) -> None:
    run_cli()
    report = folder / "runs/small/report.html"
    before = report.read_bytes()
    run_cli()  # all skipped: the same report again
    assert not (folder / "runs/small/report.old-1.html").exists()
    before = report.read_bytes()
    (folder / "value-sft").write_text("0.7")
    assert run_cli("vars.rows=9", HERE) == 0
    assert (folder / "runs/small/report.old-1.html").read_bytes() == before
    assert report.read_bytes() != before


def test_changed_outputs_are_noticed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_cli()
    starts(folder)
    (folder / "runs/small/02-dpo/samples.jsonl").write_text("{}")
    (folder / "value-dpo").write_text("0.9")
    assert run_cli() == 0
    assert starts(folder) == ["run dpo", "run score"]
    assert "dpo: run (again, its outputs were changed or removed)" in capfd.readouterr().out


def test_another_version_runs_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_cli()
    starts(folder)
    monkeypatch.setattr(recipe_state, "__version__", "9.9.9")
    assert run_cli() == 0
    assert starts(folder) == ALL
    assert "-> 9.9.9" in capfd.readouterr().out


def test_a_failing_step_ends_the_recipe(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "fail-dpo").touch()
    assert run_cli() == 3
    assert starts(folder) == ["run sft", "run dpo"]
    told = "step dpo ended with exit code 3; to continue, fix the error above and run the same"
    assert told in capfd.readouterr().err
    (folder / "fail-dpo").unlink()
    assert run_cli() == 0
    assert starts(folder) == ["run dpo", "run score"]
    assert "dpo: run (again, it did not finish)" in capfd.readouterr().out


def test_a_killed_step_is_told_as_such(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "kill-dpo").touch()
    assert run_cli() == 137
    told = (
        "step dpo was killed (SIGKILL); to continue, run the same command again: finished steps are"
    )
    assert told in capfd.readouterr().err
    (folder / "kill-dpo").unlink()
    assert run_cli() == 0
    assert starts(folder)[-2:] == ["run dpo", "run score"]


def test_an_interrupted_step_is_resumed_from_its_checkpoint(folder: Path) -> None:
    (folder / "stop-dpo").touch()
    assert run_cli() == 75
    (folder / "stop-dpo").unlink()
    starts(folder)
    assert run_cli() == 0
    assert starts(folder) == ["resume dpo", "run score"]


def test_an_interrupted_step_with_other_inputs_starts_anew(folder: Path) -> None:
    (folder / "stop-dpo").touch()
    run_cli()
    (folder / "stop-dpo").unlink()
    (folder / "value-sft").write_text("0.7")
    starts(folder)
    assert run_cli("vars.rows=9") == 0
    assert starts(folder) == ALL


def test_a_sweep_step(folder: Path) -> None:
    text = "steps:\n  - {name: s, sweep: true, overrides: ['seed=1,2', 'stage=sft']}\n"
    (folder / "small.yaml").write_text(text)
    assert run_cli("run_dir=here") == 0
    words = json.loads((folder / "here/01-s/words.json").read_text())
    assert words == ["-m", "seed=1,2", "stage=sft", "hydra.sweep.dir=here/01-s"]


def test_dry_run_tells_what_would_be_done_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("dry_run=true") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["small.yaml"]
    out = capsys.readouterr().out
    assert "01-sft: run\n  dpo-run stage=sft train.max_steps=8 optim.lr=0.001\n" in out
    assert "03-score: run (after dpo, sft)" in out
    run_cli()
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert run_cli("dry_run=true", "vars.note=x", HERE) == 0
    out = capsys.readouterr().out
    assert "01-sft: skip" in out
    assert "02-dpo: run (again, now logger.wandb_project=x" in out
    assert "03-score: run (after dpo)" in out
    assert sorted(folder.rglob("*")) == before


def test_two_of_one_recipe_do_not_meet(folder: Path) -> None:
    (folder / "runs/small").mkdir(parents=True)
    with run_lock(folder / "runs/small"):
        (folder / "runs/small/recipe.json").write_text('{"recipe": "small"}')
        assert run_cli() == 6
    assert starts(folder) == []


def test_changed_files_from_outside_are_noticed(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows, weights = folder / "my rows.jsonl", folder / "model/final/model.safetensors"
    weights.parent.mkdir(parents=True)
    (weights.parent / "config.json").touch()
    steps = (
        "steps:\n"
        "  - {name: a, overrides: {data: jsonl, data.path: my rows.jsonl}}\n"
        "  - {name: b, overrides: {model.path: model}}\n"
    )
    (folder / "small.yaml").write_text(steps)
    rows.write_text("1")
    weights.write_text("1")
    run_cli()
    starts(folder)
    rows.write_text("2")
    run_cli()
    assert starts(folder) == ["run a"]
    assert "a: run (again, the content of my rows.jsonl has changed)" in capfd.readouterr().out
    weights.write_text("2")
    run_cli()
    assert starts(folder) == ["run b"]
    run_cli(f"run_dir={folder / 'runs/small'}")  # the same folder by another name
    record = json.loads((folder / "runs/small/01-a.json").read_text())
    assert list(record["inputs"]["files"]) == ["my rows.jsonl"]


@pytest.mark.parametrize("dry", [(), ("dry_run=true",)])
def test_mistakes_of_all_steps_are_told_before_the_first_runs(
    dry: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (
        "vars: {path: none.jsonl}\n"
        "steps:\n"
        "  - {name: a, overrides: {seed: 1}}\n"
        "  - {name: b, overrides: {data: jsonl, data.path: '${vars.path}'}}\n"
        "  - {name: c, overrides: {model.path: '${steps.a.dir}', optim.lrr: 1}}\n"
        "  - {name: d, sweep: true, overrides: ['stage=dpo,sft', 'stage.beta=-1,1']}\n"
        "  - {name: e, overrides: ['stage=dpo', 'stage.beta=0.1,1']}\n"
    )
    (folder / "small.yaml").write_text(steps)
    assert run_cli(*dry) == 2
    assert starts(folder) == []
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  step b: data.path=none.jsonl: no such file or folder",
        "  step c: optim.lrr: unknown key; did you mean optim.lr?",
        "  step d: stage.beta=-1.0: must be above 0",
        "  step e: stage.beta=0.1,1: several values need sweep: true in the step (write a list as "
        "key=[a,b], text with a comma as \"key='a,b'\")",
    ]


def test_a_failed_start_leaves_no_old_folder(folder: Path) -> None:
    (folder / "fail-sft").touch()
    run_cli()
    step = folder / "runs/small/01-sft"
    (step / "words.json").unlink()  # as if it had stopped at once
    step.rmdir()
    (step / ".hydra").mkdir(parents=True)
    (step / ".hydra/overrides.yaml").touch()
    run_cli()
    assert not list(folder.glob("runs/small/*.old*"))


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train.max_steps=2", "train.max_steps=2: not an option of a recipe, which accepts "),
        ("-m", "-m: not an option of a recipe"),
        ("recipe=preferences seed=1", "seed=1: not an option of a recipe, which accepts run_dir="),
        ("vars.row=2", "vars.row: not a variable of this recipe; did you mean rows? (known: "),
        ("run_dir=used", "run_dir=used: is not empty; choose another run_dir"),
        ("run_dir=other", "run_dir=other: belongs to recipe other"),
        ("recipe=quikstart", "recipe=quikstart: unknown recipe; did you mean quickstart?"),
        ("recipe=none.yaml", "recipe=none.yaml: no such file"),
    ],
)
def test_a_mistake_in_the_command(
    words: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, file in (("used", "notes.txt"), ("other", "recipe.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text('{"recipe": "other"}')
    assert run_cli(*words.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")
    assert starts(folder) == []
