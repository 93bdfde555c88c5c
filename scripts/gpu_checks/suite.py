"""Step 1: the tests that need a CUDA device."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from scripts.common import ROOT, outcomes_of
from scripts.gpu_checks.facts import Fact, Setup, Skip

WORKERS = 10
TO_REPORT = 30  # seconds reserved for the report of a suite that is cut off
FAILED = re.compile(r"(?:FAILED|ERROR) (\S+::\S+)|(\S+::\S+) (?:FAILED|ERROR)")
MARK = "pytest.mark.cuda"
SLOW = "flex"  # FlexAttention compiles for each shape: minutes


def check(setup: Setup) -> Iterator[Fact]:
    if find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    files = [str(path) for path in tests if MARK in path.read_text()]
    assert files, f"no test has {MARK}"
    yield "files", " ".join(Path(name).name for name in files)
    report = setup.folder("suite") / "report.xml"
    words = ["-v", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", f"not {SLOW}",
             "-m", "cuda and not slow", "--tb=short", "-o", "addopts="]  # fmt: skip
    if find_spec("pytest_timeout"):
        words += [f"--session-timeout={max(1.0, setup.seconds - TO_REPORT):.0f}"]
    else:  # pytest rejects options that no plugin has registered
        words += ["-c", str(config_without_timeout(setup)), f"--rootdir={ROOT}"]
    if find_spec("xdist") and not setup.small:
        words += ["-n", str(WORKERS), "--dist", "worksteal"]
    command = [sys.executable, "-u", "-m", "pytest", *words, *files]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as pytest:
        assert pytest.stdout is not None
        for line in pytest.stdout:  # immediately, so that a killed suite has reported its failures
            print(line, end="", flush=True)
            if result := FAILED.search(line):
                yield f"seen to fail: {Path(result[1] or result[2]).name}", True
    yield "exit code", pytest.returncode
    yield from counts(report)


def config_without_timeout(setup: Setup) -> Path:
    path = setup.folder("suite") / "pytest.ini"
    path.write_text("[pytest]\nmarkers =\n  cuda\n  slow\n  timeout\n")
    return path


def counts(report: Path) -> Iterator[Fact]:
    """passed, failed, skipped, and the names of those that failed."""
    result = outcomes_of(report)
    failed = {name: why for name, (status, why) in result.items() if status in ("failure", "error")}
    skipped = Counter(why for status, why in result.values() if status == "skipped")
    yield "passed", len(result) - len(failed) - skipped.total()
    yield "failed", len(failed)
    yield "skipped", skipped.total()
    for reason, count in sorted(skipped.items()):
        yield f"skipped as {reason[:100]}", count
    for name, why in failed.items():
        yield f"failed: {name.rpartition('::')[2]}", why[:300]
