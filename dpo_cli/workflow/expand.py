"""Expand a recipe's steps to commands: repeat them per value and resolve references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from dpo_cli.config.literals import as_override
from dpo_cli.config.spelling import did_you_mean
from dpo_cli.errors import ConfigError
from dpo_cli.workflow.file import REFERENCE, Recipe, Step

MOST_TASKS = 1000
Folders = dict[str, dict[str, Path]]  # of earlier steps: name -> slug ("" if once) -> folder


@dataclass(frozen=True)
class Task:
    """A step, for one value of the recipe's `repeat`; without `repeat`, key and slug are empty."""

    step: Step
    key: str = ""
    slug: str = ""
    value: Any = None

    @property
    def label(self) -> str:
        """The folder's name: 02-dpo or 02-dpo-0."""
        return f"{self.step.label}-{self.slug}" if self.slug else self.step.label

    @property
    def title(self) -> str:
        return _title(self.step.name, self.key, self.slug)

    def at(self, run_dir: Path, folders: Folders) -> Path:
        """The task's folder, recorded in `folders` for the tasks that follow."""
        folder = run_dir / self.label
        folders.setdefault(self.step.name, {})[self.slug] = folder
        return folder


def _title(name: str, key: str, slug: str) -> str:
    return f"{name} ({key}={slug})" if slug else name


def expand(recipe: Recipe) -> list[Task]:
    """The recipe's tasks in order: adjacent repeated steps form a block, which runs for the first
    value, then for the second, ...; steps that run once come between the blocks.

    Raises ConfigError for more than MOST_TASKS, all of which are checked before the first runs.
    """
    repeat = recipe.repeat
    count = len(recipe.steps) * (len(repeat.values) if repeat else 1)
    if count > MOST_TASKS:
        raise ConfigError(f"recipe {recipe.name}: {count:,} steps; at most {MOST_TASKS:,}")
    if repeat is None:
        return [Task(step) for step in recipe.steps]
    tasks: list[Task] = []
    for once, steps in groupby(recipe.steps, key=lambda step: step.once):
        block = list(steps)
        if once:
            tasks += [Task(step) for step in block]
            continue
        for slug, value in repeat.values.items():
            tasks += [Task(step, repeat.key, slug, value) for step in block]
    return tasks


def resolve(recipe: Recipe, task: Task, folders: Folders) -> tuple[list[str], dict[str, Path]]:
    """The task's overrides, and title -> folder of the earlier tasks that they refer to."""
    references = _References(recipe, task, folders)
    overrides = task.step.overrides
    if isinstance(overrides, Mapping):
        resolved = [as_override(key, references.resolve(v)) for key, v in overrides.items()]
    else:
        resolved = [_resolve_override(text, references, task.step.sweep) for text in overrides]
    return resolved, dict(sorted(references.used.items()))


def _resolve_override(text: str, references: _References, sweep: bool) -> str:
    """`key=value`: a value that is one reference is quoted if necessary, other text is not.

    In a sweep a list contains the values to try: `stage.beta=${vars.betas}` runs once per value.
    """
    key, _, value = text.partition("=")
    if not REFERENCE.fullmatch(value):
        return str(references.resolve(text))
    resolved = references.resolve(value)
    if sweep and isinstance(resolved, list):
        return f"{key}=" + ",".join(as_override("", item).removeprefix("=") for item in resolved)
    return as_override(key, resolved)


@dataclass
class _References:
    """The values of `${...}` in one task. used: title -> folder of the tasks referenced so far."""

    recipe: Recipe
    task: Task
    folders: Folders
    used: dict[str, Path] = field(default_factory=dict)

    def resolve(self, value: Any) -> Any:
        """Resolve the references in a YAML value; a value that is one reference keeps its type."""
        if isinstance(value, list):
            return [entry for item in value for entry in self._entries(item)]
        if not isinstance(value, str):
            return value
        if match := REFERENCE.fullmatch(value):
            return self._value(match[1])
        return REFERENCE.sub(lambda match: self._text(match[1]), value)

    def _entries(self, item: Any) -> list[Any]:
        """The entries for an item of a list; `${steps.x.dirs}` gives several."""
        resolved = self.resolve(item)
        return resolved if isinstance(item, str) and isinstance(resolved, list) else [resolved]

    def _text(self, reference: str) -> str:
        if reference.startswith("steps.") and reference.endswith(".dirs"):
            raise _error(self, reference, "is a list, which cannot be part of a string")
        return str(self._value(reference))

    def _value(self, reference: str) -> Any:
        kind, _, rest = reference.partition(".")
        name, _, part = rest.rpartition(".")
        if kind == "vars" and rest in self.recipe.variables:
            return self.recipe.variables[rest]
        if kind == "repeat" and self.task.slug and rest == self.task.key:
            return self.task.value
        if kind == "steps" and part in ("dir", "dirs") and name in self.folders:
            folders = self._folders_of(name, part)
            self.used |= folders
            paths = [str(path) for path in folders.values()]
            return paths if part == "dirs" else paths[0]
        raise _unknown(self, reference)

    def _folders_of(self, name: str, part: str) -> dict[str, Path]:
        """Title -> folder for `${steps.<name>.<part>}`."""
        by_slug, slug = self.folders[name], self.task.slug
        key = self.recipe.repeat.key if self.recipe.repeat else ""
        titled = {_title(name, key, each): folder for each, folder in by_slug.items()}
        if "" in by_slug:  # it runs once: the same folder for all
            return titled
        reference = f"steps.{name}.{part}"
        if part == "dir" and not slug:
            why = f"is different for each {key}; use the list ${{steps.{name}.dirs}}"
            raise _error(self, reference, why)
        if part == "dirs" and slug:
            raise _error(self, reference, "is only available in steps with once: true")
        return {_title(name, key, slug): by_slug[slug]} if part == "dir" else titled


def _unknown(refs: _References, reference: str) -> ConfigError:
    repeat = refs.recipe.repeat
    if repeat is not None and reference == f"repeat.{repeat.key}":
        return _error(refs, reference, "has no value in a step with once: true")
    parts = ["dir"] if repeat is None else ["dir", "dirs"]
    names = [f"vars.{name}" for name in refs.recipe.variables]
    names += [f"steps.{name}.{part}" for name in refs.folders for part in parts]
    names += [f"repeat.{repeat.key}"] if repeat is not None else []
    hint = did_you_mean(reference, names)
    return _error(refs, reference, f"is neither a variable nor the folder of an earlier step{hint}")


def _error(refs: _References, reference: str, why: str) -> ConfigError:
    at = f"recipe {refs.recipe.name}, step {refs.task.title}"
    return ConfigError(f"{at}: ${{{reference}}} {why}")
