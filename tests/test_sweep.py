"""Sweeps: a process a job, failures that stay in their job, one table; and the launching."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dpo_cli import cli
from dpo_cli.config import hydra as overrides
from dpo_cli.config.literals import as_override
from dpo_cli.errors import ConfigError, RunLockedError
from dpo_cli.train.guard import run_lock
from dpo_cli.workflow import child as launch
from dpo_cli.workflow import sweep

# Stands in for `dpo-run`: notes its words; seed=2 fails, seed=3 dies, seed=9 interrupts us.
STUB = """
import json, os, pathlib, signal, sys
words = sys.argv[1:]
values = dict(word.split("=", 1) for word in words if "=" in word)
if values.get("dry_run", "").lower() == "true":
    print("plan of seed", values["seed"])
    sys.exit()
folder = pathlib.Path(values["run_dir"].strip("'"))
assert not any(folder.iterdir())
(folder / "words.json").write_text(json.dumps(words))
seed = int(values["seed"])
if seed == 2:
    sys.exit(3)
if seed == 3:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 9:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
(folder / "summary.json").write_text(json.dumps({"stage": "sft", "eval/loss": 0.5 + seed}))
(folder / "best.json").write_text(json.dumps({"value": 0.25 + seed}))
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with the stub in the place of `dpo-run`."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["dpo-run"])
    monkeypatch.setattr(launch, "child_command", lambda: [sys.executable, str(script)])
    return folder


def run_cli(*words: str) -> int:
    try:
        cli.main(list(words))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def jobs_of(folder: Path) -> dict[int, int]:
    """job -> exit code."""
    return {job["job"]: job["exit_code"] for job in sweep.recorded_jobs(folder)}


def test_every_job_is_a_process_with_its_own_folder(
    stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("-m", "seed=1", "stage=dpo", "stage.beta=0.1,0.2", "hydra.sweep.dir=s") == 0
    assert jobs_of(stub / "s") == {0: 0, 1: 0}
    words = json.loads((stub / "s/1/words.json").read_text())
    assert words == ["seed=1", "stage=dpo", "stage.beta=0.2", f"run_dir={stub}/s/1"]
    rows = (stub / "s/sweep.csv").read_text().splitlines()
    assert rows[0].startswith("job,stage.beta,status,eval/loss")
    assert rows[2].startswith("1,0.2,done,1.5")
    assert "Sweep" in capsys.readouterr().out


def test_a_failing_job_does_not_stop_the_others(
    stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("-m", "seed=3,2,4", "hydra.sweep.dir=s") == 128 + signal.SIGKILL
    assert jobs_of(stub / "s") == {0: -signal.SIGKILL, 1: 3, 2: 0}
    assert "2 of 3 jobs failed: 0, 1" in capsys.readouterr().out
    assert (stub / "s/sweep.csv").read_text().count("\n") == 4


def test_an_interrupt_reaches_the_job_and_ends_the_sweep(
    stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("-m", "seed=9,4", "hydra.sweep.dir=s") == 75  # as the job ended
    assert jobs_of(stub / "s") == {0: 75}
    assert (stub / "s/sweep.csv").is_file()


def test_sweeps_of_the_same_second_have_their_own_folders(stub: Path) -> None:
    assert run_cli("-m", "seed=1") == 0
    folders = [path.resolve() for path in (stub / "runs").iterdir()]
    for _ in range(3):
        with sweep.claimed("", ["seed=1"]) as folder:
            folders.append(folder.resolve())
    assert len(set(folders)) == 4
    assert all(folder.name.startswith("sweep-") for folder in folders)


def test_a_dry_run_shows_each_plan_and_leaves_nothing(
    stub: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("-m", "seed=1,4", "dry_run=true") == 0
    out = capfd.readouterr().out
    assert "plan of seed 1" in out
    assert "plan of seed 4" in out
    assert list(stub.iterdir()) == []


def test_a_mistake_in_a_swept_key_starts_no_job(stub: Path) -> None:
    assert run_cli("-m", "seed=1,4", "stage=sft,dop", "hydra.sweep.dir=s") == 2
    assert not (stub / "s").exists()


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["stage=dpo,evaluate", "stage.reference=x"], ["stage=dpo", "stage.reference=x"]),
        (["seed=range(3,5)", "+stage.x='a,b','c'"], ["seed=3", "+stage.x='a,b'"]),
        (["seed=choice(7,8)", "stage=glob(*)", "optim.lr=interval(0,1)"], ["seed=7"]),
    ],
)
def test_the_first_job_of_a_sweep(words: list[str], first: list[str]) -> None:
    assert overrides.first_job(words) == first


def test_values_of_a_word() -> None:
    words = overrides.parsed(["a='x y'", "a='x, y',z", "a=range(2)", "a=interval(0,1)"])
    assert list(map(overrides.values, words)) == [["x y"], ["x, y", "z"], [0, 1], []]


def test_own_yaml_reaches_the_jobs(stub: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("name: mine\nhub_id: a/b\n")
    words = ["-m", "--config-dir", str(tmp_path), "model=mine,tiny", "seed=1"]
    assert run_cli(*words, "hydra.sweep.dir=s") == 0
    assert f"hydra.searchpath=['file://{tmp_path}']" in json.loads(
        (stub / "s/1/words.json").read_text()
    )


def test_interpolations_are_left_to_the_job(stub: Path) -> None:
    assert run_cli("-m", "seed=1", "logger.wandb_project=p-${seed}", "hydra.sweep.dir=s") == 0
    words = json.loads((stub / "s/0/words.json").read_text())
    parsed = OverridesParser.create().parse_overrides(words)  # Hydra has escaped the braces
    values = {word.key_or_group: word.value() for word in parsed}
    assert values["logger.wandb_project"] == "p-${seed}"


def test_what_a_sweeper_optimises(tmp_path: Path) -> None:
    assert math.isnan(sweep.objective(tmp_path, {"loss": 1.0}))
    assert sweep.objective(tmp_path, {"reward": 0.7}) == 0.7
    (tmp_path / "best.json").write_text('{"value": 0.3, "metric": "loss"}')
    assert sweep.objective(tmp_path, {"eval/loss": 0.4}) == 0.3


def test_claims_of_one_folder(tmp_path: Path) -> None:
    chosen = str(tmp_path / "s")
    with sweep.claimed(chosen, ["seed=1"]) as folder:
        assert folder == tmp_path / "s"
        with pytest.raises(ConfigError, match="is not empty"), sweep.claimed(chosen, ["seed=1"]):
            pass
        with pytest.raises(RunLockedError), sweep.claimed(chosen, ["seed=1"], resume=True):
            pass
    with sweep.claimed(chosen, ["seed=1"], resume=True) as folder:
        assert folder == tmp_path / "s"


def test_a_folder_with_nothing_but_a_lock_is_free(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()  # killed before it wrote anything
    with sweep.claimed(str(tmp_path), ["seed=1"]):
        assert json.loads((tmp_path / "sweep.json").read_text()) == {"overrides": ["seed=1"]}


def test_a_job_that_outlived_its_sweep_is_waited_for(tmp_path: Path) -> None:
    with sweep.claimed(str(tmp_path), ["seed=1"]):
        (tmp_path / "0").mkdir()
    with (
        run_lock(tmp_path / "0"),
        pytest.raises(RunLockedError, match="in use by process"),
        sweep.claimed(str(tmp_path), ["seed=1"], resume=True),
    ):
        pass


# ---------------------------------------------------------------- launching


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_handed_on_once_and_the_child_is_waited_for(
    number: signal.Signals, tmp_path: Path
) -> None:
    child = (
        "import pathlib, signal, sys, time\n"
        "def stop(number, frame):\n"
        "    with open('signals', 'a') as file: print(number, file=file)\n"
        "    time.sleep(0.3)\n"  # saving
        "    sys.exit(75)\n"
        f"signal.signal({number}, stop)\n"
        "pathlib.Path('ready').touch()\n"
        "while True: signal.pause()\n"
    )
    (tmp_path / "child.py").write_text(child)
    parent = (
        "import sys\nfrom dpo_cli.workflow import child\n"
        "child.child_command = lambda: [sys.executable, 'child.py']\n"
        "print(child.run_child([]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        cwd=tmp_path,
        env={"PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[1]), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 20
    while not (tmp_path / "ready").exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert out == "(75, True)\n"
    assert (tmp_path / "signals").read_text() == f"{int(number)}\n"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)))
    | st.text(r"'\"${}[](),:=\ ab/"),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(VALUES)
def test_an_override_reads_back_as_the_value_it_was_made_of(value: object) -> None:
    parsed = OverridesParser.create().parse_override(as_override("key", value))
    cfg = OmegaConf.create({"key": None})
    OmegaConf.update(cfg, "key", parsed.value())
    read = OmegaConf.to_container(cfg, resolve=True)
    assert read == {"key": value}
