"""Kills before every file operation of a recipe's and a sweep's parent process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.faults.beyond import finished_recipe, words_of
from scripts.faults.crash import Fault, Operation, killer, recorder
from scripts.faults.kills import leftovers, watch
from scripts.faults.lab import TINY, Lab, check

REFUSED = 3  # exit code of the stub of a child
SWEEP = ("-m", *TINY, "stage=sft", "train.max_steps=1", "seed=0,1")


def own_files(lab: Lab) -> str:
    """Case B19: the first files, with children that exit immediately, then those after the last
    child."""
    recipe, sweep = finished_recipe(lab), finished_sweep(lab)
    parts = [
        f"recipe {everywhere(lab, None, recipe_words(lab), REFUSED)} at the start",
        f"{everywhere(lab, recipe, recipe_words(lab), 0, 'report.html')} at the report",
        f"sweep {everywhere(lab, None, sweep_words, REFUSED)} at the start",
        f"{everywhere(lab, sweep, sweep_words, 0, 'sweep.csv')} at the summary",
    ]
    return f"killed before each operation: {', '.join(parts)}; each continued, nothing left over"


def finished_sweep(lab: Lab) -> Path:
    if "sweep" not in lab.shared:
        lab.shared["sweep"] = run = lab.fresh("whole-sweep")
        lab.dpo(*SWEEP, f"hydra.sweep.dir={run}")
    return lab.shared["sweep"]


def recipe_words(lab: Lab) -> Callable[[Path], Sequence[str]]:
    return lambda run: (words_of(lab), f"run_dir={run}")


def sweep_words(run: Path) -> Sequence[str]:
    """The command that starts the sweep, or with one more override resumes it."""
    resume = ("resume=true",) if (run / "sweep.json").is_file() else ()
    return (*SWEEP, f"hydra.sweep.dir={run}", *resume)


def everywhere(
    lab: Lab,
    start: Path | None,
    words: Callable[[Path], Sequence[str]],
    code: int,
    result: str = "",
) -> int:
    """Kill a command before each of its operations in a folder; returns their number. start: the
    folder to copy; None: it does not exist, and children are stubs. code: expected exit code.
    """
    recorded, run = lab.folder / "operations.json", lab.folder / "work"

    def execute(fault: Fault | None, code: int | None) -> int:
        def install() -> None:
            if start is None:
                stub_children()
            if fault is not None:
                watch(fault, run).install()

        return lab.forked(*words(run), fault=install, code=code).code

    def reset() -> None:
        shutil.rmtree(run, ignore_errors=True)
        if start is not None:
            shutil.copytree(start, run)

    reset()
    execute(recorder(recorded), code)
    ops: list[Operation] = [tuple(entry) for entry in json.loads(recorded.read_text())]
    expected = (run / result).read_bytes() if result.endswith(".csv") else b""
    bad = []
    for at, (kind, path) in enumerate(ops):
        reset()
        execute(killer(at), -9)
        exit_code = execute(None, None)
        complete = not result or ((run / result).is_file() and (run / result).stat().st_size)
        same = not expected or (run / result).read_bytes() == expected
        if exit_code != code or not complete or not same or leftovers(run):
            bad.append(f"{kind} {Path(path).name}: exit {exit_code}, left {leftovers(run)}")
    check(ops and not bad, f"{len(bad)} of {len(ops)}: {'; '.join(bad[:3])}")
    return len(ops)


def stub_children() -> None:
    """Replace steps and jobs by stubs, in the process under test."""
    from dpo_cli.workflow import child

    command = [sys.executable, "-S", "-c", f"raise SystemExit({REFUSED})"]
    child.child_command = lambda: command
