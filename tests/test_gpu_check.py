"""`make gpu`: the small form of every step, and how steps that go wrong are told."""

from __future__ import annotations

import json
import math
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench_workers import in_process, use
from scripts import gpu_check as script
from scripts.bench import compare
from scripts.common import ROOT
from scripts.gpu_checks import attention, commands, facts, page, runner, speed, steps, suite

SMALL_CHECKS = ("ceilings", "attention", "exactness", "shortage", "sharding", "sampling", "saving",
                "output_layer")  # fmt: skip


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture
def setup(tmp_path: Path) -> facts.Setup:
    return facts.Setup("cpu", str(tmp_path / "work"), threads=1, seconds=100)


def seen(setup: facts.Setup, run: str) -> dict[str, Any]:
    """The facts of a step's small form, which are as the step expects them."""
    by_run = {step.run: step for step in steps.STEPS}
    run = f"scripts.gpu_checks.{run}"
    name, _, function = run.partition(":")
    found = dict(getattr(import_module(name), function)(setup))
    verdict = facts.judge(by_run[run].expected, found, "cpu")
    assert verdict.failures == []
    return found


def test_every_step_names_a_check_and_the_table_fits_into_eight_minutes() -> None:
    assert sorted(step.number for step in steps.STEPS) == list(range(len(steps.STEPS)))
    for step in steps.STEPS:
        name, _, function = step.run.partition(":")
        assert callable(getattr(import_module(name), function))
        assert step.seconds < step.limit
    up_to_decoding = [step for step in steps.STEPS if step.number in {*range(13), 16}]
    groups = list(runner.in_turn(up_to_decoding, True))
    assert [len(group) for group in groups] == [1, 7, *[1] * 6]
    assert sum(max(step.seconds for step in group) for group in groups) <= 480
    assert all(len(group) == 1 for group in runner.in_turn(steps.STEPS, False))


def test_what_is_expected() -> None:
    expected = [facts.Expect("loss *", low=1, high=2), facts.Expect("speed", about=(5, 6)),
                facts.Expect("passed", low=1, cuda=True)]  # fmt: skip
    good = {"loss a": 1.0, "loss b": 2, "speed": 5.5, "passed": 3}
    assert facts.judge(expected, good, "cuda") == facts.Verdict([], [], [])
    slow = facts.judge(expected, good | {"speed": 4.0}, "cuda")
    assert slow == facts.Verdict([], [], ["speed: 4, estimated 5 to 6"])
    assert facts.judge(expected, good | {"speed": 4.0}, "cpu") == facts.Verdict([], [], [])
    for wrong in (0.9, math.nan, "text", None):
        assert len(facts.judge(expected, good | {"loss b": wrong}, "cuda").failures) == 1
    missing = facts.judge(expected, {"speed": 5.5}, "cuda").failures
    assert missing == ["loss *: not seen", "passed: not seen"]
    assert facts.judge(expected, {"speed": 5.5, "loss": 1}, "cpu").failures == ["loss *: not seen"]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`toys("fine", "hangs")`: the report of a run of these checks, and the exit status."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setattr(runner, "CPU_PATIENCE", 1)

    def run(*names: str, words: tuple[str, ...] = (), limit: int = 20) -> tuple[list[Any], int]:
        made = tuple(
            steps.Step(number, name, f"gpu_check_toys:{name}", 1, 2 if name == "hangs" else limit,
                       "a toy", [facts.Expect("answer", 42, 42)], alone=number > 2)
            for number, name in enumerate(names)
        )  # fmt: skip
        monkeypatch.setattr(script, "STEPS", made)
        code = script.main(
            ["--device=cpu", f"--out={tmp_path / 'out'}", f"--work={tmp_path}", *words]
        )
        lines = (tmp_path / "out" / "gpu-check-cpu.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], code

    return run


def test_a_step_that_goes_wrong_stops_no_other(
    toys: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("hangs", "fails", "fine", "crashes", "skips")
    (about, *rows), code = toys(*names, words=("--together",))
    assert code == 1
    assert about["device"] == "cpu"
    assert "--out=out" in about["command"]
    by_name = {row["name"]: row for row in rows}
    assert [row["name"] for row in rows] == list(names)
    status = {name: row["status"] for name, row in by_name.items()}
    assert status == {"hangs": "FAIL", "fails": "FAIL", "fine": "ok", "crashes": "FAIL",
                      "skips": "skipped"}  # fmt: skip
    assert by_name["hangs"]["why"] == ["killed after 2 s"]
    assert by_name["fails"]["why"] == ["ValueError: a bug | of ours",
                                       "answer: 41, must be answer: = 42"]  # fmt: skip
    assert by_name["crashes"]["why"] == ["its process ended with code -11"]
    assert by_name["crashes"]["facts"] == {"answer": 42}  # what it has found out before is kept
    assert by_name["skips"]["why"] == ["no such package"]
    assert by_name["fine"]["versions"]["python"]
    page = (tmp_path / "out" / "gpu-check-cpu.md").read_text()
    assert "5 of 5 steps done, 3 failed" in page
    assert "| 1 | fails | FAIL |" in page
    log = (tmp_path / "out" / "gpu-check-cpu.log").read_text()
    assert "second line" in log and "Traceback" in log and "hangs now" in log  # noqa: PT018
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith('{"step"') for line in printed) == len(names)


def test_a_hanging_step_is_killed_with_workers_in_sessions_of_their_own(
    toys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pids: list[int] = []
    real = runner.outcome_of

    def kept(*args: Any) -> Any:  # before the folder is removed
        pids.extend(int(p.read_text()) for p in tmp_path.glob("dpo-run-gpu-check-*/worker"))
        return real(*args)

    monkeypatch.setattr(runner, "outcome_of", kept)
    assert toys("hangs")[1] == 1
    (pid,) = pids
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or ") Z " in stat.read_text()


def test_what_does_not_fit_into_the_minutes(toys: Any, tmp_path: Path) -> None:
    assert toys("fine")[1] == 0
    step = steps.STEPS[7]
    late = runner.Run("cuda", tmp_path, None, None, step.seconds / 2, SimpleNamespace())
    outcome = late.outcome_of_step(step, 1)
    assert outcome.status == "skipped"
    assert "are left (--minutes)" in outcome.why[0]


def test_a_step_that_the_end_of_the_time_cuts_off_has_not_failed(toys: Any) -> None:
    (_, row), code = toys("hangs", words=("--minutes=0.03",), limit=20)
    assert code == 0
    assert row["status"] == "skipped"
    assert re.fullmatch(r"cut off after [12] s by --minutes", row["why"][0])


def test_what_was_wrong_before_the_cut_has_failed() -> None:
    step = steps.STEPS[1]
    failed = {"seen to fail: test_toy_cuda.py::test_bad": True}
    statuses = [page.outcome_of(step, {"facts": told}, page.CUT_OFF, 3.0, "cuda").status
                for told in ({}, failed)]  # fmt: skip
    assert statuses == ["skipped", "FAIL"]


def test_words_that_mean_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--only=99"], ["--skip=x"], ["--only=3", "--skip=0-9"], ["--data=absent"]):
        with pytest.raises(SystemExit, match="2"):
            script.main(words)
    assert script.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(steps.STEPS)


@pytest.mark.parametrize("name", SMALL_CHECKS)
def test_the_small_form_of_a_step(
    name: str, setup: facts.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpo = import_module("dpo_cli.stages.dpo")
    monkeypatch.setattr(dpo, "dpo_loss", dpo.dpo_loss)  # a check replaces it in its own process
    assert len(seen(setup, f"{name}:check")) > 2


def test_a_kernel_that_is_wrong_is_seen(
    setup: facts.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = import_module("dpo_cli.model.attention.kernels")
    real = kernels.padded
    monkeypatch.setattr(
        kernels, "padded", lambda q, k, v, mask, call: 1.03 * real(q, k, v, mask, call)
    )
    found = dict(attention.check(setup))
    assert max(v for k, v in found.items() if k.startswith("difference, sdpa")) > 0.02


def test_the_command_in_its_small_form(setup: facts.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: three seconds of imports each would be most of the time."""
    cli = import_module("dpo_cli.cli")

    def start(runs: Any, name: str, words: list[str]) -> Any:
        try:
            cli.main(list(words))
            code = 0
        except SystemExit as end:
            code = end.code
        return SimpleNamespace(wait=lambda: code)

    monkeypatch.setattr(commands.Runs, "start", start)
    found = seen(setup, "commands:check")
    assert {"sft: exit code", "dpo: exit code"} <= found.keys()


def test_the_words_of_the_whole_form_are_accepted(tmp_path: Path) -> None:
    compose = import_module("dpo_cli.config.read")
    composed = import_module("dpo_cli.config.hydra").composed
    setup = facts.Setup("cuda", str(tmp_path))
    runs = commands.Runs(setup, setup.folder("commands"))
    for name in ("sft", "reward"):
        (runs.folder / name).mkdir()
    stages = set()
    for jobs in (commands.first_runs(setup), commands.second_runs(setup, runs)):
        for name, words in jobs.items():
            given = runs.words(name, *words)
            stages.add(compose.prepare(composed(given, "config"), given).stage.name)
    assert stages == {"sft", "dpo", "reward", "ppo-baseline", "sample", "evaluate"}


def test_the_suite_counts_what_failed(
    setup: facts.Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_toy_cuda.py").write_text(
        "import pytest\n"
        f"pytestmark = {suite.MARK}\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_flex_is_slow(): raise SystemError\n"
        "@pytest.mark.skipif(True, reason='no device')\n"
        "def test_skipped(): pass\n"
    )
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    found = dict(suite.check(setup))
    wanted = {"passed": 1, "failed": 1, "skipped": 1, "exit code": 1, "skipped as no device": 1}
    assert wanted.items() <= found.items()
    assert "1 == 2" in found["failed: test_bad"]
    assert found["seen to fail: test_toy_cuda.py::test_bad"]  # also where the suite is killed


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The benchmark and its workers in this process, as in `test_bench.py`."""

    def run(command: list[str], seconds: float) -> tuple[int, str]:
        capsys.readouterr()
        code = compare.main(command[2:])
        return code, capsys.readouterr().out

    use(in_process, monkeypatch)
    monkeypatch.setattr(speed, "output_of", run)


@pytest.mark.parametrize("side", ["weights", "ours", "compiled", "trl", "qlora"])
def test_the_benchmark_in_its_small_form(side: str, setup: facts.Setup, bench: None) -> None:
    if side == "trl" and find_spec("trl") is None:
        pytest.skip("trl is not installed")
    ours = {"losses": "0.6931 0.6931", "ours, pairs/s": 1e6, "ours, peak memory, GiB": 1.0}
    setup.folder(".")
    Path(setup.work, "step-7.json").write_text(json.dumps({"facts": ours}))
    found = seen(setup, f"speed:{side}")
    assert side == "weights" or "bench.py" in found["command"]
    if side == "trl":
        assert found["pairs/s, ours / TRL"] == pytest.approx(1e6 / found["TRL, pairs/s"])
        assert 0 <= found["losses, largest difference from ours"] < 0.01
    if side == "compiled":
        assert found["pairs/s, compiled / ours"] == found["compiled, pairs/s"] / 1e6
