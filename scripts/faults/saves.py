"""Cases of kills: at random, before every operation of a save, within a file."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

from scripts.faults.crash import Operation, Watch, killer, recorder
from scripts.faults.lab import OVER, PPO, SAVES, Lab, check, same_final, steps_of, until

EVERY_STEP = ("train.save_every_steps=1", "train.eval_every_steps=0")


def loops(lab: Lab) -> dict[str, tuple[str, ...]]:
    """Name -> overrides of a run, long enough for all kills."""
    steps, base = 8 * lab.kills, f"model.path={lab.base()}"
    common = (*EVERY_STEP, f"train.max_steps={steps}", base)
    return {
        "sft": (*OVER, "stage=sft", *common),
        "dpo": (*OVER, "stage=dpo", *common),
        "reward": (*OVER, "stage=reward", *common),
        "ppo-baseline": (*OVER, *PPO, *EVERY_STEP, f"train.max_steps={2 * steps}", base),
        "lora (dpo)": (*OVER, "stage=dpo", "lora=lora", "lora.dropout=0.1", *common),
    }


def kill_loop(lab: Lab) -> str:
    """Case 1: new processes, killed at random moments after the first save."""
    output = []
    for name, words in loops(lab).items():
        slug = name.partition(" ")[0]
        truth = lab.uninterrupted(f"loop-{slug}", *words)
        kills = killed_until_done(lab, slug, words)
        run = lab.folder / f"killed-{slug}"
        check(same_final(run, truth), f"{name}: after {kills} kills the final weights differ")
        check(kills >= lab.kills, f"{name}: ended after {kills} kills of {lab.kills}")
        output.append(f"{name} {kills}")
    return f"kills, each resumed: {', '.join(output)}; final sha256 identical"


def killed_until_done(lab: Lab, name: str, words: tuple[str, ...]) -> int:
    """Kill and resume until the run is done; returns the number of kills.

    A quarter of the kills are at any moment after the start, including import and restore; the
    others are within a few steps of a process's first save.
    """
    dice = random.Random(f"{lab.seed} {name}")
    run, lives, startup = lab.fresh(f"killed-{name}"), 0, 1.0
    while lives < lab.kills:
        child = lab.start(*([*words, f"run_dir={run}"] if lives == 0 else [f"resume={run}"]))
        if lives > 0 and dice.random() < 0.25:
            time.sleep(dice.uniform(0, startup))
        else:
            before, start = steps_of(run)[-1:], time.monotonic()
            until(lambda before=before: steps_of(run)[-1:] != before, child)
            startup = time.monotonic() - start
            time.sleep(dice.uniform(0, 0.25))
        if not child.running():
            lab.wait(child).must(0, f"{name}: start {lives + 1}")
            return lives
        child.end()
        lives += 1
    lab.dpo(f"resume={run}", what=f"{name}: the last resume")
    return lives


def operations(lab: Lab, scope: str, call: int = 2) -> list[Operation]:
    """The operations of a save, in order."""
    results, run = lab.folder / "operations.json", lab.fresh("traced")
    results.unlink(missing_ok=True)
    trace = Watch(recorder(results), scope, call)
    lab.forked(*SAVES, f"run_dir={run}", fault=trace.install, what="the traced run")
    return [tuple(entry) for entry in json.loads(results.read_text())]


def every_operation(lab: Lab, scope: str, half: bool = False) -> str:
    """Kill a run before each operation of its second save (half: after each write, which is then
    truncated to half its length), and resume it."""
    ops = operations(lab, scope)
    places = [i for i in range(len(ops)) if not half or (i and ops[i - 1][0] == "open")]
    bad = []
    for at in places:
        run = lab.fresh("cut")
        fault = Watch(killer(at, half), scope)
        lab.forked(*SAVES, f"run_dir={run}", fault=fault.install, code=-9, what=f"operation {at}")
        check(steps_of(run), f"killed before operation {at}: no checkpoint is left")
        resumed = lab.forked(f"resume={run}", code=None)
        if resumed.code or not same_final(run, lab.saves()):
            kind, path = ops[at]
            bad.append(f"{kind} {Path(path).name}: exit {resumed.code}")
    check(not bad, f"{len(bad)} of {len(places)} resumes wrong: {'; '.join(bad[:3])}")
    kinds = ", ".join(f"{sum(k == kind for k, _ in ops)} {kind}" for kind in dict(ops))
    what = "truncated files" if half else f"operations ({kinds})"
    return f"{len(places)} {what}: {len(places)}/{len(places)} resumed, final sha256 identical"


def operations_of_a_save(lab: Lab) -> str:
    """Case 2."""
    return every_operation(lab, "save")


def half_written(lab: Lab) -> str:
    """Case 3."""
    return every_operation(lab, "save", half=True)


def trace(lab: Lab) -> str:
    """Case 9: which files are synced, and what is last."""
    ops = operations(lab, "save")
    renamed = next(i for i, (kind, path) in enumerate(ops)
                   if kind == "rename" and path.endswith("step-2"))  # fmt: skip
    folder = lab.folder / "traced" / "checkpoints"
    files = {path.name for path in (folder / "step-2").iterdir()}
    synced = [Path(path) for kind, path in ops[:renamed] if kind == "fsync"]
    names = {path.name for path in synced}
    check(files <= names, f"not synced before the rename: {sorted(files - names)}")
    check(synced[-1].name.startswith(".tmp-step-2"), f"synced last: {synced[-1].name}")
    late = [path for kind, path in ops[renamed:] if kind == "open" and "/checkpoints/" in path]
    check(not late, f"written after the rename: {late}")
    after = ops[renamed + 1]
    check(after == ("fsync", str(folder)), f"after the rename comes {after}")
    return f"{len(files)} files and their folder synced, then the rename, then the parent synced"


def killed_in_a_prune(lab: Lab) -> str:
    """Case 13."""
    ops, bad = operations(lab, "prune", call=3), []
    for at in range(len(ops)):
        run = lab.fresh("cut")
        fault = Watch(killer(at), "prune", call=3)
        lab.forked(*SAVES, f"run_dir={run}", fault=fault.install, code=-9, what=f"operation {at}")
        resumed = lab.forked(f"resume={run}", code=None)
        from_newest = "resuming after step 3" in resumed.output
        if resumed.code or not from_newest or not same_final(run, lab.saves()):
            bad.append(f"{ops[at][0]} {Path(ops[at][1]).name}: exit {resumed.code}")
    check(not bad and ops, f"{len(bad)} of {len(ops)}: {'; '.join(bad[:3])}")
    return f"killed before each of {len(ops)} operations: the newest checkpoint was used each time"
