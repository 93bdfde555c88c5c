"""`dpo-run recipe=...`: run the steps in order and skip those that are finished.

    <run_dir>/recipe.json     the recipe and its variables   01-sft/       folder of a step
              01-sft.json     its inputs, and its outputs' identity once it is finished

A step is finished if it succeeded with the same inputs: its overrides, the files it reads, the
outputs of the steps it uses, and the version of dpo-run.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_cli.config.hydra import composed, first_job, parsed
from dpo_cli.config.literals import as_override
from dpo_cli.config.read import prepare
from dpo_cli.durable import disk_errors, write_json
from dpo_cli.durable.redact import hide, redact, unkept
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.escapes import say
from dpo_cli.report.output import go_on_in
from dpo_cli.run_folder import (
    clear_leftovers,
    is_bare,
    is_used,
    make,
    read_json,
    refuse_locked,
    set_aside,
)
from dpo_cli.train.guard import run_lock
from dpo_cli.workflow.child import run_child, shell_status
from dpo_cli.workflow.expand import Folders, Task, expand, resolve
from dpo_cli.workflow.file import Recipe, find_recipe, load_recipe
from dpo_cli.workflow.plan import because, print_plan
from dpo_cli.workflow.state import Decision, examine, first_few, identity, record_of
from dpo_cli.workflow.summary import Outcome, print_outcomes, print_report

RECIPE, REPORT = "recipe.json", "report.html"


@dataclass(frozen=True)
class Command:
    """The arguments after `dpo-run`."""

    recipe: str
    settings: list[str]  # x=1 of vars.x=1
    run_dir: Path | None
    dry_run: bool


def run_recipe(words: Sequence[str]) -> int:
    """Run the command `dpo-run <words>`; returns the exit code of the first failed step, or 0."""
    command = parse(words)
    recipe = load_recipe(find_recipe(command.recipe), command.settings)
    hide(recipe.variables)
    run_dir = command.run_dir or default_folder(recipe)
    _refuse_foreign(run_dir, recipe)
    _check_steps(recipe, run_dir)
    if command.dry_run:
        print_plan(recipe, run_dir)
        return 0
    make(run_dir)
    with run_lock(run_dir):
        clear_leftovers(run_dir)
        write_json(run_dir / RECIPE, {"recipe": recipe.name, "vars": recipe.variables})
        go_on_in(run_dir)
        return _run_steps(recipe, run_dir)


def parse(words: Sequence[str]) -> Command:
    """recipe=, vars.*=, run_dir= and dry_run=; ConfigError for anything else."""
    name, run_dir, dry_run, settings, unknown = "", None, False, [], []
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
            unknown.append(word)
    if unknown:
        variables = load_recipe(find_recipe(name), complete=False).variables
        listed = ", ".join(f"vars.{variable}={value}" for variable, value in variables.items())
        raise ConfigError(
            f"{' '.join(unknown)}: not an option of a recipe, which accepts run_dir=, dry_run=true "
            f"and its variables ({listed or 'it has none'})"
        )
    return Command(name, settings, run_dir, dry_run)


def default_folder(recipe: Recipe) -> Path:
    """`runs/<recipe>`, or the first of `-2`, `-3`, ... without a finished run with other variables,
    whose results it would replace. Additional values of `repeat` replace nothing."""
    repeated = list(recipe.repeat.values.values()) if recipe.repeat else None
    variables = redact(json.loads(json.dumps(recipe.variables)))
    free = {name for name, value in recipe.variables.items() if value == repeated}
    number = 1
    while True:
        folder = Path("runs", recipe.name if number == 1 else f"{recipe.name}-{number}")
        stored = read_json(folder / RECIPE)
        finished = stored.get("recipe") == recipe.name and (folder / REPORT).is_file()
        before = redact(stored.get("vars") or {})
        changed = {n for n in {*before, *variables} if before.get(n) != variables.get(n)}
        if not finished or changed <= free:
            if number > 1:
                say(f"runs/{recipe.name} has other variables; writing to {folder}")
            return folder
        number += 1


def keep_report(run_dir: Path, outcomes: Sequence[Outcome]) -> None:
    """Rename an earlier report to `report.old-1.html`, `-2`, ..., if any step ran again."""
    report = run_dir / REPORT
    if report.is_file() and any(outcome.action != "skip" for outcome in outcomes):
        number = 1
        while (old := run_dir / f"report.old-{number}.html").exists():
            number += 1
        with disk_errors(report):
            report.rename(old)
        say(f"earlier report renamed to {old}")


def _refuse_foreign(run_dir: Path, recipe: Recipe) -> None:
    """ConfigError if the folder is in use by anything but this recipe."""
    owner = read_json(run_dir / RECIPE).get("recipe")
    if is_used(run_dir) and owner != recipe.name:
        problem = f"belongs to recipe {owner}" if owner else "is not empty"
        raise ConfigError(f"run_dir={run_dir}: {problem}; choose another run_dir")


def _check_steps(recipe: Recipe, run_dir: Path) -> None:
    """Compose and check all steps before the first runs; ConfigError with the problems of all.

    Outputs of earlier steps may be missing.
    """
    folders: Folders = {}
    tasks = expand(recipe)
    problems: dict[str, list[Task]] = {}  # message -> its tasks
    for task in tasks:
        words, _ = resolve(recipe, task, folders)
        task.at(run_dir, folders)
        try:
            first = first_job(words) if task.step.sweep else single(words)
            prepare(composed(first), words, coming=[run_dir])
        except ConfigError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(task)
    if problems:
        lines = (f"{_titles(affected, tasks)}: {line}" for line, affected in problems.items())
        raise ConfigError("\n".join(lines))


def single(words: Sequence[str]) -> list[str]:
    """The overrides of a step that is a single run. ConfigError if they are those of a sweep."""
    for word in parsed(words):
        if word.is_sweep_override():
            raise ConfigError(
                f"{word.input_line}: several values need sweep: true in the step "
                "(write a list as key=[a,b], text with a comma as \"key='a,b'\")"
            )
    return list(words)


def _titles(affected: Sequence[Task], tasks: Sequence[Task]) -> str:
    """`step dpo`, `steps dpo, ppo (seed=1)`: a step affected at all values is listed once."""
    titles: list[str] = []
    for name in dict.fromkeys(task.step.name for task in affected):
        each = [task.title for task in affected if task.step.name == name]
        titles += [name] if len(each) == sum(task.step.name == name for task in tasks) else each
    return f"step{'s' * (len(titles) > 1)} {first_few(titles)}"


def _run_steps(recipe: Recipe, run_dir: Path) -> int:
    outcomes: list[Outcome] = []
    folders: Folders = {}
    tasks = expand(recipe)
    for number, task in enumerate(tasks, 1):
        inputs, decision = examine(recipe, task, run_dir, folders)
        head = f"[{number}/{len(tasks)}] {task.title}"
        say(f"{head}: {decision.action}{because(decision)}")
        folder, started = task.at(run_dir, folders), time.monotonic()
        code = 0
        if decision.action != "skip":
            code = _run_task(task, folder, inputs, decision)
        seconds = time.monotonic() - started
        if code:
            say(_remedy(task, folder, code), error=True)
            return shell_status(code)
        spent = record_of(task, run_dir).get("seconds")
        names = (task.step.name, task.step.label, task.label, task.title)
        outcomes.append(Outcome(*names, str(folder), decision.action, seconds, spent))
    print_outcomes(outcomes)
    summary = facts(recipe, run_dir, outcomes)
    print_report(summary["report"], recipe.repeat.key if recipe.repeat else "")
    from dpo_cli.report.page_recipe import write_recipe_report  # jinja2 is slow to import

    keep_report(run_dir, outcomes)
    say(f"report: {write_recipe_report(run_dir, summary)}")
    return 0


def facts(recipe: Recipe, run_dir: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The steps, their folders and times as plain values for the report.

    steps: the fields of `Outcome`, in execution order; report: label, and one folder per repeated
    value.
    """
    repeat = recipe.repeat
    return {
        "recipe": recipe.name,
        "description": recipe.description,
        "vars": recipe.variables,
        "repeat": {repeat.key: list(repeat.values.values())} if repeat else {},
        "run_dir": str(run_dir),
        "steps": [asdict(outcome) for outcome in outcomes],
        "report": [
            {
                "label": row["label"],
                "folders": [o.folder for o in outcomes if o.name == row["step"]],
            }
            for row in recipe.report
        ],
    }


def _remedy(task: Task, folder: Path, code: int) -> str:
    resumes = "runs its remaining jobs" if task.step.sweep else "is resumed if it has checkpoints"
    how = (
        f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    )
    fixable = code in (ConfigError.exit_code, DataError.exit_code)
    first = "fix the error above and " if fixable else ""
    return (
        f"step {task.title} {how}; to continue, {first}run the same command "
        f"again: finished steps are skipped, {folder} {resumes} (remove it to restart the step)"
    )


def _run_task(task: Task, folder: Path, inputs: dict[str, Any], decision: Decision) -> int:
    path = folder.with_name(f"{task.label}.json")
    before = read_json(path)
    refuse_locked(folder)
    has_results = is_used(folder) if task.step.sweep else not is_bare(folder)
    if decision.action == "run" and has_results:
        set_aside(folder, folder.with_name(f"{folder.name}.old"))
    record: dict[str, Any] = {"status": "started", "inputs": inputs, "seconds": 0.0}
    if decision.action == "resume":
        record["seconds"] = before.get("seconds", 0.0)
    if "finished_seconds" in before:
        record["finished_seconds"] = before["finished_seconds"]
    write_json(path, record)
    started = time.monotonic()
    code, stopped = run_child(_command(task, folder, inputs["overrides"], decision))
    record["seconds"] += time.monotonic() - started
    if code == 0:
        record |= {"status": "done", "outputs": identity(folder)}
        record["finished_seconds"] = record["seconds"]
    write_json(path, record)
    if stopped and code == 0:
        raise KeyboardInterrupt
    return code


def _command(task: Task, folder: Path, words: list[str], decision: Decision) -> list[str]:
    resumed = decision.action == "resume"
    if task.step.sweep:
        sweep_dir = as_override("hydra.sweep.dir", str(folder))
        return ["-m", *words, sweep_dir, *(["resume=true"] if resumed else [])]
    if resumed:
        return [f"resume={folder}", *unkept(words)]
    return [*words, as_override("run_dir", str(folder))]
