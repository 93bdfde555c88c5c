"""Run folders: their names, whose they are, what is stored in them, resume."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli_helpers import Starts, fails
from dpo_cli import cli
from dpo_cli.config import RunConfig
from dpo_cli.errors import ConfigError
from dpo_cli.report.files import write_run_files
from dpo_cli.run import resume_point
from dpo_cli.run_folder import default_run_dir
from dpo_cli.train.guard import run_lock
from small_runs import configure

pytest_plugins = ["cli_fixtures"]


def test_a_run_gets_a_folder_of_its_own(empty: Path, starts: Starts) -> None:
    for _ in range(2):  # in the same second
        cli.main(["stage=dpo", "seed=3"])
    first, second = (Path(config.run_dir) for config, _ in starts)
    assert first != second
    assert first.parent == Path("runs")
    assert first.name.startswith("dpo-tiny-sentiment-")
    assert starts[0][1] == ["dpo-run", "stage=dpo", "seed=3"]
    assert starts[0][0].seed == 3
    stored = first / ".hydra"
    assert {path.name for path in stored.iterdir()} == {
        "config.yaml",
        "hydra.yaml",
        "overrides.yaml",
    }
    assert (stored / "overrides.yaml").read_text() == "- stage=dpo\n- seed=3\n"


def test_names_cannot_leave_the_runs_folder(empty: Path, starts: Starts) -> None:
    cli.main(["model.name='../../x y'"])
    assert Path(starts[0][0].run_dir).parent == Path("runs")
    assert Path(starts[0][0].run_dir).name.startswith("sft-x-y-sentiment-")
    assert default_run_dir(starts[0][0]).parts[0] == "runs"


@pytest.mark.parametrize("key", ["run_dir", "hydra.run.dir"])
def test_the_users_folder_is_honoured(key: str, empty: Path, starts: Starts) -> None:
    cli.main([f"{key}=here/it"])
    assert starts[0][0].run_dir == "here/it"
    assert (empty / "here/it/.hydra/config.yaml").is_file()


def test_a_used_folder_is_refused_with_the_way_on(
    empty: Path, starts: Starts, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["run_dir=a"])
    (empty / "a/summary.json").touch()
    before = (empty / "a/.hydra/overrides.yaml").read_text()
    message = fails(capsys, "run_dir=a", "seed=1")
    assert message == (
        "run_dir=a: is not empty; continue it with dpo-run resume=a, or choose another run_dir"
    )
    assert (empty / "a/.hydra/overrides.yaml").read_text() == before
    (empty / "b").mkdir()
    (empty / "b/notes.txt").touch()
    assert fails(capsys, "run_dir=b") == "run_dir=b: is not empty; choose another run_dir"
    (empty / "c").mkdir()
    cli.main(["run_dir=c"])
    assert len(starts) == 2


@pytest.mark.parametrize("words", [["run_dir=a", "seed=2"], ["resume=a", "seed=2"]])
def test_the_folder_of_a_start_that_failed_is_used_again(
    words: list[str], empty: Path, starts: Starts
) -> None:
    cli.main(["run_dir=a", "seed=1"])
    (empty / "a/metrics.jsonl").write_text("")  # it came no further
    (empty / "a/command.txt").write_text("dpo-run seed=1\n")
    cli.main(words)
    config, _ = starts[1]
    assert (config.run_dir, config.seed, config.resume) == ("a", 2, False)
    assert "seed=2" in (empty / "a/.hydra/overrides.yaml").read_text()
    assert not (empty / "a/command.txt").exists()  # the new run writes its own


def test_a_dry_run_in_the_folder_of_a_failed_start_changes_nothing(
    empty: Path, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.main(["run_dir=a"])
    (empty / "a/metrics.jsonl").write_text("")
    before = {p: p.read_bytes() for p in (empty / "a").rglob("*") if p.is_file()}
    plan = SimpleNamespace(print_plan=lambda config: None)
    monkeypatch.setitem(sys.modules, "dpo_cli.plan.dry_run", plan)  # type: ignore[arg-type]
    cli.main(["run_dir=a", "dry_run=true"])
    assert {p: p.read_bytes() for p in (empty / "a").rglob("*") if p.is_file()} == before


def test_a_folder_at_work_is_refused(
    empty: Path, starts: Starts, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["run_dir=a"])
    with run_lock(empty / "a"):
        for words in (["run_dir=a"], ["resume=a"], ["run_dir=a", "resume=true"]):
            assert "a: in use by process" in fails(capsys, *words, code=6)
    assert len(starts) == 1


def test_a_folder_that_cannot_be_made(
    empty: Path, starts: Starts, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / "file").touch()
    message = fails(capsys, "run_dir=file/below", code=74)
    assert message == (
        "file/below: Not a directory: something else has this name; choose another path"
    )


def test_dry_run_prints_the_plan_and_creates_nothing(
    empty: Path, starts: Starts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def print_plan(config: RunConfig) -> None:
        print(f"plan for {config.stage.name}")

    monkeypatch.setitem(sys.modules, "dpo_cli.plan.dry_run", SimpleNamespace(print_plan=print_plan))  # type: ignore[arg-type]
    cli.main(["stage=dpo", "dry_run=true"])
    assert capsys.readouterr().out == "plan for dpo\n"
    assert list(empty.iterdir()) == []
    assert starts == []


def test_values_of_the_environment_are_not_stored(
    empty: Path, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    cli.main(
        ["run_dir=a", "logger.wandb_project=${oc.env:MY_TOKEN}", "hydra.job.env_copy=[MY_TOKEN]"]
    )
    assert starts[0][0].logger.wandb_project == "correct-horse-battery"
    for path in (empty / "a/.hydra").iterdir():
        assert "correct-horse" not in path.read_text()


# ---------------------------------------------------------------- resume


def test_resume_composes_what_was_started(empty: Path, starts: Starts, tmp_path: Path) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/little.yaml").write_text("name: little\nhub_id: a/b\n")
    folder = empty / "it's (mine)"
    mine = ["--config-dir", str(tmp_path / "mine"), "model=little"]
    cli.main([*mine, "stage=dpo", "optim.lr=1e-3", "seed=4", f'run_dir="{folder}"'])
    cli.main([f"resume={folder}", "optim.lr=2e-3"])
    before, after = starts[0][0], starts[1][0]
    assert not before.resume
    assert after.resume
    assert after.run_dir == str(folder)
    assert after.optim.lr == 2e-3
    assert (after.stage, after.model, after.seed) == (before.stage, before.model, before.seed)
    assert "1e-3" in (folder / ".hydra/overrides.yaml").read_text()


def test_resume_of_a_run_that_never_got_going_starts_it(empty: Path, starts: Starts) -> None:
    cli.main(["run_dir=a", "seed=5"])
    for name in ("config.yaml", "metrics.jsonl"):
        (empty / "a" / name).unlink()
    cli.main(["resume=a"])
    cli.main(["run_dir=new", "resume=true"])  # the same command starts and continues
    assert [(config.resume, config.run_dir) for config, _ in starts[1:]] == [
        (False, "a"),
        (False, "new"),
    ]
    assert starts[1][0].seed == 5


def test_foreign_code_is_allowed_anew_at_each_start(
    empty: Path, starts: Starts, capsys: pytest.CaptureFixture[str]
) -> None:
    trust = "model.trust_remote_code=true"
    cli.main(["run_dir=a", trust])
    assert "set it on the command line" in fails(capsys, "resume=a")
    cli.main(["resume=a", trust])
    assert starts[-1][0].model.trust_remote_code


def test_another_machine_goes_on_but_not_with_another_computation(tmp_path: Path) -> None:
    write_run_files(tmp_path, asdict(configure("hardware=cpu")), ["dpo-run"])
    moved = ("hardware=cuda", "resume=true")
    assert resume_point(configure(*moved), tmp_path) is None  # nothing saved as yet
    with pytest.raises(ConfigError, match=r": hardware\.compile: none -> blocks$"):
        resume_point(configure(*moved, "hardware.compile=true"), tmp_path)
