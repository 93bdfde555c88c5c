"""The fault programme's own bones: all cases are there, and a row that goes wrong says FAIL."""

from __future__ import annotations

import ast
import os
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import processes
from scripts.common import ROOT, outcomes_of
from scripts.faults import lab, main
from scripts.faults.cases import CASES, Case
from scripts.faults.covered import COVERED


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lab sets variables of the environment."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_all_forty_cases_have_a_row() -> None:
    numbers = [case.number for case in CASES]
    assert numbers[:40] == [str(number) for number in range(1, 41)]
    assert len(set(numbers)) == len(numbers)
    assert set(COVERED) <= set(numbers)


def test_the_tests_that_rows_name_exist() -> None:
    named = {test for tests in COVERED.values() for test in tests}
    there = set()
    for path in {ROOT / "tests" / test.partition("::")[0] for test in named}:
        for node in ast.parse(path.read_text()).body:
            inside = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{path.name}::{node.name}::" if inside[0] is not node else f"{path.name}::"
            there |= {prefix + n.name for n in inside if isinstance(n, ast.FunctionDef)}
    assert named <= there, named - there


def test_a_row_that_goes_wrong_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:

    def fails(lab_: Any) -> str:
        lab.check(False, f"9 of 10 | {lab_.folder}/run resumed")
        raise AssertionError

    def breaks(lab_: Any) -> str:
        raise ValueError("bug\nof ours")

    runs = {"1": lambda lab_: "20/20", "2": fails, "3": breaks}
    made = [Case(number, "name", "must", run) for number, run in runs.items()]
    monkeypatch.setattr(main, "CASES", made)
    assert main.main(["--cases=1,2,3", f"--out={tmp_path / 'table.md'}"]) == 1
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[-1] for row in rows] == ["pass |", "FAIL |", "FAIL |"]
    assert rows[1][-2] == "9 of 10 / run resumed (0 s)"
    assert rows[2][-2] == "ValueError: bug of ours (0 s)"
    assert (tmp_path / "table.md").read_text() == out
    assert main.main(["--cases=1"]) == 0
    with pytest.raises(SystemExit):
        main.main(["--cases=41"])


def test_a_skipped_test_has_not_passed(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a.TestB" name="test_c[1]"/>'
        '<testcase classname="tests.test_a" name="test_d"><skipped message="no GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert outcomes_of(report) == {
        "test_a.py::TestB::test_c[1]": ("passed", ""), "test_a.py::test_d": ("skipped", "no GPU"),
    }  # fmt: skip


def test_a_killed_process_takes_its_children_along(tmp_path: Path) -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True); "
    child = lab.Lab(tmp_path).python("-c", code + "time.sleep(60)")
    while len(results := processes.marked(child.mark)) < 2:
        assert child.running()
    inner = processes.Process(["sleep", "60"], tmp_path / "log", {processes.MARK: child.mark})
    child.end()
    assert child.wait() == -9
    deadline = time.monotonic() + 5
    while any(map(_runs, [*results, inner.popen.pid])):  # also one that has a mark of its own
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert inner.wait() == -9


def test_what_runs_too_long_is_killed(tmp_path: Path) -> None:
    room = lab.Lab(tmp_path)
    assert room.wait(room.python("-c", "import time; time.sleep(60)"), 0.2).code == -9
    done = room.wait(room.python("-c", "print('error: no'); raise SystemExit(3)"))
    assert (done.code, done.last) == (3, "error: no")
    with pytest.raises(lab.Failed, match="a run: exit 3: error: no"):
        done.must(0, "a run")
    with pytest.raises(lab.Failed, match="`yes` not printed: error: no"):
        done.must(3, "", "yes")
    assert done.must(3, "", "no") is done.must(None) is done


def _runs(pid: int) -> bool:
    """Zombies, whom nobody has waited for, do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
