"""Kills before every operation of a recipe's and a sweep's own files."""

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

REFUSED = 3  # how the stub of a child ends
SWEEP = ("-m", *TINY, "stage=sft", "train.max_steps=1", "seed=0,1")


def own_files(lab: Lab) -> str:
    """Case B19: their first files with children that end at once, then what comes after the last
    child."""
    recipe, sweep = finished_recipe(lab), finished_sweep(lab)
    told = [
        f"recipe {everywhere(lab, None, recipe_words(lab), REFUSED)} at the start",
        f"{everywhere(lab, recipe, recipe_words(lab), 0, 'report.html')} at the report",
        f"sweep {everywhere(lab, None, sweep_words, REFUSED)} at the start",
        f"{everywhere(lab, sweep, sweep_words, 0, 'sweep.csv')} at the summary",
    ]
    return f"killed before each operation: {', '.join(told)}; went on each time, nothing left"


def finished_sweep(lab: Lab) -> Path:
    if "sweep" not in lab.made:
        lab.made["sweep"] = run = lab.fresh("whole-sweep")
        lab.dpo(*SWEEP, f"hydra.sweep.dir={run}")
    return lab.made["sweep"]


def recipe_words(lab: Lab) -> Callable[[Path], Sequence[str]]:
    return lambda run: (words_of(lab), f"run_dir={run}")


def sweep_words(run: Path) -> Sequence[str]:
    """The same command starts it, and with one more override goes on."""
    begun = ("resume=true",) if (run / "sweep.json").is_file() else ()
    return (*SWEEP, f"hydra.sweep.dir={run}", *begun)


def everywhere(
    lab: Lab,
    start: Path | None,
    words: Callable[[Path], Sequence[str]],
    code: int,
    result: str = "",
) -> int:
    """How many operations of a command in a folder it was killed before. start: the folder to copy;
    None: nothing is there, and children are stubs. code: how the command ends.
    """
    found, run = lab.folder / "operations.json", lab.folder / "work"

    def again(fault: Fault | None, expected: int | None) -> int:
        def install() -> None:
            if start is None:
                stub_children()
            if fault is not None:
                watch(fault, run).install()

        return lab.forked(*words(run), fault=install, code=expected).code

    def anew() -> None:
        shutil.rmtree(run, ignore_errors=True)
        if start is not None:
            shutil.copytree(start, run)

    anew()
    again(recorder(found), code)
    ops: list[Operation] = [tuple(entry) for entry in json.loads(found.read_text())]
    wanted = (run / result).read_bytes() if result.endswith(".csv") else b""
    bad = []
    for at, (kind, path) in enumerate(ops):
        anew()
        again(killer(at), -9)
        ended = again(None, None)
        whole = not result or ((run / result).is_file() and (run / result).stat().st_size)
        same = not wanted or (run / result).read_bytes() == wanted
        if ended != code or not whole or not same or leftovers(run):
            bad.append(f"{kind} {Path(path).name}: exit {ended}, left {leftovers(run)}")
    check(ops and not bad, f"{len(bad)} of {len(ops)}: {'; '.join(bad[:3])}")
    return len(ops)


def stub_children() -> None:
    """In a process that is to fail: no step or job does anything."""
    from dpo_cli.workflow import child

    command = [sys.executable, "-S", "-c", f"raise SystemExit({REFUSED})"]
    child.child_command = lambda: command
