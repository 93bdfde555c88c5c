"""Kills before every file operation of complete commands, which must then continue."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.faults.crash import Operation, Watch, killer, recorder
from scripts.faults.lab import (
    OVER,
    SAVES,
    UNTRAINED,
    Done,
    Failed,
    Lab,
    check,
    final_digest,
    same_final,
)

LEFTOVERS = (".tmp-", ".old-")
QUICK = ("stage.max_new_tokens=4", "stage.batch_size=16")
Same = Callable[[Path, Path], bool]  # whether a folder has the results of an uninterrupted run


def operations(lab: Lab, words: Sequence[str], run: Path, under: Path) -> list[Operation]:
    """The file operations of a command in a folder, in its main thread, in order."""
    recorded = lab.folder / "operations.json"
    recorded.unlink(missing_ok=True)
    lab.forked(*words, f"run_dir={run}", fault=watch(recorder(recorded), under).install)
    return [tuple(entry) for entry in json.loads(recorded.read_text())]


def watch(fault: Callable[[Operation, list[Operation]], None], under: Path) -> Watch:
    return Watch(fault, "command", under=under)


def continued(lab: Lab, run: Path, words: Sequence[str]) -> Done:
    """`resume=<folder>`, or else the same command again: one of them must succeed."""
    done = lab.forked(f"resume={run}", code=None)
    return done if done.code == 0 else lab.forked(*words, f"run_dir={run}", code=None)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(LEFTOVERS)]


def killed_everywhere(
    lab: Lab, words: Sequence[str], same: Same, until: Callable[[Operation], bool] | None = None
) -> str:
    """Kill a command before each of its operations; returns their number. Failed if it did not
    continue, ended with other results, or left an incomplete file.

    until: whether to stop at an operation; default: never.
    """
    truth, run = lab.fresh("undisturbed"), lab.fresh("killed")
    lab.forked(*words, f"run_dir={truth}")
    ops = operations(lab, words, run, run)
    count = next((i for i, op in enumerate(ops) if until and until(op)), len(ops))
    bad = []
    for at in range(count):
        shutil.rmtree(run, ignore_errors=True)
        fault = watch(killer(at), run)
        what = f"{ops[at][0]} {Path(ops[at][1]).name}"
        lab.forked(*words, f"run_dir={run}", fault=fault.install, code=-9, what=what)
        done = continued(lab, run, words)
        if done.code or not same(run, truth):
            bad.append(f"{what}: exit {done.code}, {done.last}")
        elif left := leftovers(run):
            bad.append(f"{what}: left {left}")
    check(count and not bad, f"{len(bad)} of {count}: {'; '.join(bad[:3])}")
    return str(count)


def start_and_end(lab: Lab) -> str:
    """Case B17."""
    count = killed_everywhere(lab, SAVES, same_final, until=lambda op: "checkpoints" in op[1])
    return (
        f"killed before each of {count} operations up to the first checkpoint, and of "
        f"{killed_at_the_end(lab)} from the final model on: each continued, final sha256 "
        "identical, nothing left over"
    )


def killed_at_the_end(lab: Lab) -> int:
    """Kills while a run with its last checkpoint writes final model, metrics, plots and report."""
    words = (*(w for w in SAVES if not w.startswith("logger.")), "logger.progress=plain")
    truth, run = lab.uninterrupted("ends", *words), lab.folder / "killed"
    recorded, bad = lab.folder / "operations.json", []
    resumed = lab.cut(truth, "killed")
    lab.forked(f"resume={resumed}", fault=watch(recorder(recorded), run).install)
    ops = [tuple(entry) for entry in json.loads(recorded.read_text())]
    for at, (kind, path) in enumerate(ops):
        lab.cut(truth, "killed")
        fault = watch(killer(at), run)
        lab.forked(f"resume={run}", fault=fault.install, code=-9, what=f"{kind} {path}")
        done = lab.forked(f"resume={run}", code=None)
        complete = (run / "summary.json").is_file() and (run / "report.html").is_file()
        if done.code or not complete or not same_final(run, truth) or leftovers(run):
            bad.append(f"{kind} {Path(path).name}: exit {done.code}, left {leftovers(run)}")
    check(ops and not bad, f"{len(bad)} of {len(ops)}: {'; '.join(bad[:3])}")
    return len(ops)


def other_stages(lab: Lab) -> str:
    """Case B18: sample, label, evaluate, export."""
    base, pairs = f"model.path={lab.base()}", ("pairs.jsonl", "train.jsonl", "eval.jsonl")
    sample = (*UNTRAINED, base, "stage=sample", "stage.completions=2", *QUICK)
    drawn = lab.uninterrupted("drawn", *sample)
    label = ("stage=label", f"stage.samples={drawn}", "reward_fn=length")
    commands: dict[str, tuple[tuple[str, ...], Same]] = {
        "sample": ((base, "stage=sample", *QUICK), same_files(*pairs)),
        "label": (label, same_files(*pairs)),
        "evaluate": ((base, "stage=evaluate", "stage.prompts=4", *QUICK),
                     same_files("points.jsonl", "samples.jsonl")),
        "export": ((base, "stage=export"), same_final),
    }  # fmt: skip
    counts = []
    for name, (words, same) in commands.items():
        try:
            counts.append(f"{name} {killed_everywhere(lab, (*UNTRAINED, *words), same)}")
        except Failed as failed:
            raise Failed(f"{name}: {failed}") from None
    return f"killed before each operation: {', '.join(counts)}; each continued, results identical"


def same_files(*names: str) -> Same:
    """Compares those of the files that the uninterrupted run has, byte by byte."""

    def same(run: Path, truth: Path) -> bool:
        expected = [name for name in names if (truth / name).is_file()]
        return bool(expected) and all(
            (run / name).is_file() and (run / name).read_bytes() == (truth / name).read_bytes()
            for name in expected
        )

    return same


def caches(lab: Lab) -> str:
    """Case B20: the caches of encoded rows and of the reference's log-probabilities."""
    rows = lab.folder / "rows.jsonl"
    rows.write_text("".join(
        json.dumps({"prompt": f"p{i} ", "chosen": f"good {i}", "rejected": f"bad {i}"}) + "\n"
        for i in range(24)
    ))  # fmt: skip
    words = (*(w for w in OVER if not w.startswith("data.")), "stage=dpo", "data=jsonl",
             f"data.path={rows}", "data.eval_rows=8", "data.max_length=64", "train.max_steps=1",
             f"model.path={lab.base()}")  # fmt: skip
    cache, truth = lab.fresh("own-cache"), lab.fresh("uncached")
    words = (*words, f"cache_dir={cache}")
    lab.forked(*words, f"run_dir={truth}")
    recorded, bad = lab.folder / "operations.json", []
    shutil.rmtree(cache)
    run = lab.fresh("caching")
    lab.forked(*words, f"run_dir={run}", fault=watch(recorder(recorded), cache).install)
    ops = [tuple(entry) for entry in json.loads(recorded.read_text())]
    for at, (kind, path) in enumerate(ops):
        shutil.rmtree(cache, ignore_errors=True)
        fault = watch(killer(at), cache)
        lab.forked(*words, f"run_dir={lab.fresh('caching')}", fault=fault.install, code=-9)
        done = lab.forked(*words, f"run_dir={lab.fresh('caching')}", code=None)
        if done.code or final_digest(run) != final_digest(truth) or leftovers(cache):
            bad.append(f"{kind} {Path(path).name}: exit {done.code}, left {leftovers(cache)}")
    check(ops and not bad, f"{len(bad)} of {len(ops)}: {'; '.join(bad[:3])}")
    return f"killed before each of {len(ops)} operations: recomputed, identical, nothing left over"
