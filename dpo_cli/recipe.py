"""`dpo-run recipe=...`: run the steps in order, leave out what is finished already.

    <run_dir>/recipe.json     which recipe works here      01-sft/       folder of a step
              01-sft.json     its inputs, and its outputs' identity once it is done

A step is finished if it ended well with the same inputs: its overrides, the files it reads,
what the steps it uses have written, and the version of dpo-run.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli import __version__, recipe_report
from dpo_cli.compose import prepare
from dpo_cli.durable import disk_errors, write_json
from dpo_cli.errors import ConfigError
from dpo_cli.launch import as_override, run_child, shell_status
from dpo_cli.overrides import composed, first_job
from dpo_cli.recipe_file import Recipe, Step, find_recipe, load_recipe, resolve
from dpo_cli.recipe_state import Decision, decide, identity, outside_files
from dpo_cli.run_folder import is_bare, is_used, make, read_json, refuse_locked
from dpo_cli.train.guard import run_lock


@dataclass(frozen=True)
class Command:
    """The words after `dpo-run`."""

    recipe: str
    settings: list[str]  # x=1 of vars.x=1
    run_dir: Path | None
    dry_run: bool


@dataclass(frozen=True)
class Outcome:
    """What was done with a step."""

    step: Step
    action: str
    seconds: float


def run_recipe(words: Sequence[str]) -> int:
    """Run the command `dpo-run <words>`; the exit code of the first step that fails."""
    command = parse(words)
    recipe = load_recipe(find_recipe(command.recipe), command.settings)
    run_dir = command.run_dir or Path("runs", recipe.name)
    _refuse_foreign(run_dir, recipe)
    _check_steps(recipe, run_dir)
    if command.dry_run:
        _print_plan(recipe, run_dir)
        return 0
    make(run_dir)
    with run_lock(run_dir):
        write_json(run_dir / "recipe.json", {"recipe": recipe.name, "vars": recipe.variables})
        return _run_steps(recipe, run_dir)


def parse(words: Sequence[str]) -> Command:
    """recipe=, vars.*=, run_dir= and dry_run=; anything else would reach no step."""
    name, run_dir, dry_run, settings, refused = "", None, False, [], []
    for word in words:
        key, _, value = word.partition("=")
        if key == "recipe":
            name = value
        elif key == "run_dir":
            run_dir = Path(os.path.expanduser(value))
        elif key == "dry_run" and value.lower() in ("true", "false"):
            dry_run = value.lower() == "true"
        elif key.startswith("vars.") and "=" in word:
            settings.append(word.removeprefix("vars."))
        else:
            refused.append(word)
    if refused:
        variables = load_recipe(find_recipe(name), complete=False).variables
        listed = ", ".join(f"vars.{variable}={value}" for variable, value in variables.items())
        raise ConfigError(
            f"{' '.join(refused)}: would reach no step; a recipe takes run_dir=, dry_run=true and "
            f"its variables ({listed or 'it has none'})"
        )
    return Command(name, settings, run_dir, dry_run)


def _refuse_foreign(run_dir: Path, recipe: Recipe) -> None:
    """The folder must be new, or this recipe's."""
    owner = read_json(run_dir / "recipe.json").get("recipe")
    if is_used(run_dir) and owner != recipe.name:
        whose = f"belongs to recipe {owner}" if owner else "is not empty"
        raise ConfigError(f"run_dir={run_dir}: {whose}; choose another run_dir")


def _check_steps(recipe: Recipe, run_dir: Path) -> None:
    """Compose and check every step, so that a slip in the last one shows before the first runs.

    What an earlier step has yet to write may be missing.
    """
    folders: dict[str, Path] = {}
    problems: list[str] = []
    for step in recipe.steps:
        words, _ = resolve(recipe, step, folders)
        folders[step.name] = run_dir / step.label
        try:
            prepare(composed(first_job(words) if step.sweep else words), words, coming=[run_dir])
        except ConfigError as error:
            problems += [f"step {step.name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))


def _run_steps(recipe: Recipe, run_dir: Path) -> int:
    outcomes: list[Outcome] = []
    folders: dict[str, Path] = {}
    for step in recipe.steps:
        inputs, decision = _examine(recipe, step, run_dir, folders)
        count = f"[{step.number}/{len(recipe.steps)}] {step.name}"
        print(f"{count}: {decision.action}{_because(decision)}", flush=True)
        started = time.monotonic()
        code = 0
        if decision.action != "skip":
            code = _run_step(step, run_dir / step.label, inputs, decision)
        outcomes.append(Outcome(step, decision.action, time.monotonic() - started))
        if code:
            print(
                f"step {step.name} ended with exit code {code}; to go on, run the same command "
                f"again: finished steps are skipped, {run_dir / step.label} is resumed if it has "
                "checkpoints (remove it to start that step anew)",
                file=sys.stderr,
            )
            return shell_status(code)
        folders[step.name] = run_dir / step.label
    recipe_report.print_outcomes([(o.step.label, o.action, o.seconds) for o in outcomes])
    recipe_report.print_report([(row["label"], folders[row["step"]]) for row in recipe.report])
    return 0


def _because(decision: Decision) -> str:
    return f" ({decision.reason})" if decision.reason else ""


def _examine(
    recipe: Recipe, step: Step, run_dir: Path, folders: dict[str, Path]
) -> tuple[dict[str, Any], Decision]:
    """The step's inputs as they are now, and what follows for it."""
    overrides, uses = resolve(recipe, step, folders)
    inputs = {
        "overrides": overrides,
        "files": outside_files(overrides, run_dir),
        "uses": {name: identity(folders[name]) for name in uses},
        "version": __version__,
    }
    record = read_json(run_dir / f"{step.label}.json")
    return inputs, decide(run_dir / step.label, record, inputs)


def _run_step(step: Step, folder: Path, inputs: dict[str, Any], decision: Decision) -> int:
    record = folder.with_name(f"{step.label}.json")
    refuse_locked(folder)
    kept = is_used(folder) if step.sweep else not is_bare(folder)
    if decision.action == "run" and kept:
        _set_aside(folder)
    write_json(record, {"status": "started", "inputs": inputs})
    if decision.action == "resume":
        words = [f"resume={folder}"]
    elif step.sweep:
        words = ["-m", *inputs["overrides"], as_override("hydra.sweep.dir", str(folder))]
    else:
        words = [*inputs["overrides"], as_override("run_dir", str(folder))]
    code, stopped = run_child(words)
    if code == 0:
        outputs = identity(folder)
        write_json(record, {"status": "done", "inputs": inputs, "outputs": outputs})
    if stopped and code == 0:
        raise KeyboardInterrupt
    return code


def _set_aside(folder: Path) -> None:
    """Keep the step's previous folder as `<folder>.old-1`, `.old-2`, ...: it may be a model."""
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    with disk_errors(folder):
        folder.rename(old)


def _print_plan(recipe: Recipe, run_dir: Path) -> None:
    """What would be done, step by step; creates nothing."""
    rows: list[tuple[str, str, str]] = []
    folders: dict[str, Path] = {}
    again: set[str] = set()
    for step in recipe.steps:
        overrides, uses = resolve(recipe, step, folders)
        if waiting := again.intersection(uses):
            decision = Decision("run", f"after {', '.join(sorted(waiting))}")
        else:
            _, decision = _examine(recipe, step, run_dir, folders)
        folders[step.name] = run_dir / step.label
        if decision.action != "skip":
            again.add(step.name)
        command = shlex.join(["dpo-run", *(["-m"] if step.sweep else []), *overrides])
        rows.append((step.label, f"{decision.action}{_because(decision)}", command))
    recipe_report.print_plan(f"{recipe.name}: {recipe.description}", rows, run_dir)
