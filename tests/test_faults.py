"""The fault programme's own bones: all cases are there, and a row that goes wrong says FAIL."""

from __future__ import annotations

import ast
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`module("faults_lab")`: a module of scripts/. A lab sets variables of the environment."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module


def test_all_forty_cases_have_a_row(module: Any) -> None:
    cases, covered = module("faults_cases").CASES, module("faults_tests").COVERED
    numbers = [case.number for case in cases]
    assert numbers[:40] == [str(number) for number in range(1, 41)]
    assert len(set(numbers)) == len(numbers)
    assert set(covered) <= set(numbers)


def test_the_tests_that_rows_name_exist(module: Any) -> None:
    named = {test for tests in module("faults_tests").COVERED.values() for test in tests}
    there = set()
    for path in {ROOT / "tests" / test.partition("::")[0] for test in named}:
        for node in ast.parse(path.read_text()).body:
            inside = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{path.name}::{node.name}::" if inside[0] is not node else f"{path.name}::"
            there |= {prefix + n.name for n in inside if isinstance(n, ast.FunctionDef)}
    assert named <= there, named - there


def test_a_row_that_goes_wrong_says_so(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    faults, lab = module("faults"), module("faults_lab")

    def fails(lab_: Any) -> str:
        lab.check(False, f"9 of 10 | {lab_.folder}/run resumed")
        raise AssertionError

    def breaks(lab_: Any) -> str:
        raise ValueError("bug\nof ours")

    runs = {"1": lambda lab_: "20/20", "2": fails, "3": breaks}
    case = module("faults_cases").Case
    made = [case(number, "name", "must", run) for number, run in runs.items()]
    monkeypatch.setattr(faults, "CASES", made)
    assert faults.main(["--cases=1,2,3", f"--out={tmp_path / 'table.md'}"]) == 1
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[-1] for row in rows] == ["pass |", "FAIL |", "FAIL |"]
    assert rows[1][-2] == "9 of 10 / run resumed (0 s)"
    assert rows[2][-2] == "ValueError: bug of ours (0 s)"
    assert (tmp_path / "table.md").read_text() == out
    assert faults.main(["--cases=1"]) == 0
    with pytest.raises(SystemExit):
        faults.main(["--cases=41"])


def test_a_skipped_test_has_not_passed(module: Any, tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a.TestB" name="test_c[1]"/>'
        '<testcase classname="tests.test_a" name="test_d"><skipped message="no GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = module("faults_tests").read_report(report)
    assert found == {
        "test_a.py::TestB::test_c[1]": "passed", "test_a.py::test_d": "skipped: no GPU"
    }  # fmt: skip


def test_a_killed_process_takes_its_children_along(module: Any, tmp_path: Path) -> None:
    lab = module("faults_lab")
    room = lab.Lab(tmp_path)
    code = "import subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True); "
    child = room.python(["-c", code + "time.sleep(60)"])
    while not (found := lab.children(child.pid)):
        assert child.poll() is None
    lab.kill_all(child)
    assert room.wait(child).code == -9
    deadline = time.monotonic() + 5
    while _runs(found[0]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Zombies, whom nobody has waited for, do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
