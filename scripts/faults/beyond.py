"""Cases other than single runs: recipes, sweeps, caches, checkpoints of another layout."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

from scripts.faults.damage import HARMS, flip_bit
from scripts.faults.lab import (
    OVER,
    TINY,
    Lab,
    check,
    checkpoint,
    final_digest,
    same_final,
    steps_of,
    until,
)

STEPS = ("01-sft", "02-dpo")


def three_steps(lab: Lab) -> tuple[str, ...]:
    """Overrides of a DPO run of three steps, each saved."""
    return (*OVER, "stage=dpo", "train.max_steps=3", "train.save_every_steps=1",
            f"model.path={lab.base()}")  # fmt: skip


def recipe_of(lab: Lab, name: str) -> Path:
    """A recipe of SFT and DPO on its result, both tiny, with one variable per step."""
    common, over = (", ".join(f"'{word}'" for word in (*words, "train.save_every_steps=2"))
                    for words in (TINY, OVER))  # fmt: skip
    path = lab.folder / f"{name}.yaml"
    path.write_text(
        "description: two tiny steps\n"
        "vars: {lr: 0.003, beta: 0.1}\n"
        "steps:\n"
        f"  - name: sft\n    overrides: [{common}, 'stage=sft', 'train.max_steps=30',"
        " 'optim.lr=${vars.lr}']\n"
        f"  - name: dpo\n    overrides: [{over}, 'stage=dpo', 'train.max_steps=30',"
        " 'stage.beta=${vars.beta}', 'model.path=${steps.sft.dir}']\n"
    )
    return path


def words_of(lab: Lab, name: str = "pair") -> str:
    return f"recipe={recipe_of(lab, name)}"


def finished_recipe(lab: Lab) -> Path:
    """The folder of a recipe run without interruptions."""
    return lab.once("recipe", [words_of(lab)], lab.dpo)


def killed_recipe(lab: Lab) -> str:
    """Case B1: kill all processes at random moments, between and within steps."""
    truth, run = finished_recipe(lab), lab.fresh("killed-recipe")
    words = (words_of(lab), f"run_dir={run}")
    dice = random.Random(f"{lab.seed} recipe")
    places: list[str] = []
    for life in range(max(3, lab.kills // 3)):
        child, before = lab.start(*words), progress(run)
        until(lambda before=before: progress(run) != before, child)
        time.sleep(dice.uniform(0, 0.3) if life % 3 else dice.uniform(0, 3))
        if not child.running():
            break
        child.end()
        places.append("-".join(map(str, progress(run))))
    lab.dpo(*words, what="the last start")
    for step in STEPS:
        check(same_final(run / step, truth / step), f"step {step}: final weights differ")
    check(len(places) >= 3, f"only {len(places)} kills before the end")
    return f"{len(places)} kills (last saves: {', '.join(places)}), both steps' sha256 identical"


def progress(run: Path) -> tuple[int, ...]:
    """The newest checkpoint of either step."""
    return tuple((steps_of(run / step) or [0])[-1] for step in STEPS)


def half_written_step(lab: Lab) -> str:
    """Case B2: outputs of a finished step are truncated afterwards."""
    truth, run = finished_recipe(lab), lab.copy(finished_recipe(lab), "torn-recipe")
    weights = run / "01-sft" / "final" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    reason = "sft: run (again, its outputs were changed or removed)"
    lab.dpo(words_of(lab), f"run_dir={run}").must(0, "reason", reason)
    check(same_final(run / "01-sft", truth / "01-sft"), "step sft: final weights differ")
    return f"`{reason}`, then repeated, identical"


def other_recipe(lab: Lab) -> str:
    """Case B3."""
    run = lab.copy(finished_recipe(lab), "two-recipes")
    before = set(run.rglob("*"))
    done = lab.dpo(words_of(lab, "other"), f"run_dir={run}", code=2)
    done.must(2, "", "belongs to recipe pair")
    check(before == set(run.rglob("*")), "files were created or removed")
    return f"exit 2: `{done.last}`"


def changed_inputs(lab: Lab) -> str:
    """Case B4."""
    run = lab.copy(finished_recipe(lab), "changed-recipe")
    done = lab.dpo(words_of(lab), f"run_dir={run}", "vars.beta=0.3")
    lines = [line for line in done.output.splitlines() if line.startswith("[")]
    again = "dpo: run (again, now stage.beta=0.3" in lines[-1]
    check("sft: skip" in lines[0] and again, f"printed: {lines}")
    differs = final_digest(run / "02-dpo") != final_digest(finished_recipe(lab) / "02-dpo")
    check(differs, "the step was not trained again")
    return f"`{lines[-1]}`; the previous step is unchanged"


def torn_caches(lab: Lab) -> str:
    """Case B6: truncate every file of the caches of log-probabilities and of encoded rows."""
    words = three_steps(lab)
    truth, cache = lab.uninterrupted("caches", *words), lab.folder / "cache"
    results = sorted(path for path in cache.rglob("*") if path.is_file())
    kinds = HARMS | {"bit flipped": flip_bit}
    check(any("reference" in path.parts for path in results), "there is no cache of the reference")
    saved, bad = lab.copy(cache, "good-cache"), []
    for kind, harm in kinds.items():
        shutil.rmtree(cache)
        shutil.copytree(saved, cache)
        for path in results:
            harm(path)
        run = lab.fresh("cached")
        done = lab.forked(*words, f"run_dir={run}", code=None)
        if done.code or not same_final(run, truth):
            bad.append(f"{kind}: exit {done.code}: {done.last}")
    check(not bad, f"{len(bad)}: {'; '.join(bad[:3])}")
    return f"{len(results)} files, {', '.join(kinds)}: recomputed, final sha256 identical"


def older_layout(lab: Lab) -> str:
    """Case B9: a valid checkpoint with the layout of another version."""
    from dpo_cli.durable import replace_json

    run = lab.cut(lab.uninterrupted("caches", *three_steps(lab)), "layout")
    newest = checkpoint(run, 3)
    state = json.loads((newest / "state.json").read_text())
    replace_json(newest, "state.json", {**state, "layout": 0})
    lab.forked(f"resume={run}", code=5, output=["layout 0", "model.path="])
    return "exit 5, names both layouts and two remedies"
