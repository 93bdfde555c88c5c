"""report.html of a recipe: its models side by side, and every step below."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_cli.report.numbers import (
    NOTHING,
    before,
    bracketed,
    count,
    figure,
    interval,
    is_number,
    lower,
    minutes,
    with_unit,
)
from dpo_cli.report.page import run_parts, write_page
from dpo_cli.report.page_figures import (
    KEY,
    MAX_TILES,
    TILES,
    Picture,
    Tile,
    pictures_of,
    shown_name,
    tile_of,
    tiles_of,
    words_of,
)
from dpo_cli.report.page_read import Folder, Row, cleaned, read_folder, read_object
from dpo_cli.report.page_samples import Samples, completions_of, first_by_prompt, side_by_side
from dpo_cli.report.page_story import method_of, verdict_of
from dpo_cli.report.page_tables import comparison, facts, win_rates
from dpo_cli.report.table import Column, Table

_VERDICT = ("reward", "kl", "accuracy", "win_rate", "rewards/accuracies", "loss")
_DONE = {"run": "ran", "resume": "resumed", "skip": "skipped"}


@dataclass(frozen=True)
class Step:
    """A step with all its repeats. folder: of the first; seconds: of all, over all starts."""

    label: str
    repeats: int
    status: str
    seconds: float | None
    command: str
    folder: Folder


@dataclass(frozen=True)
class Model:
    """A column of the comparison. summary: for several repeats their means, with standard
    deviations as `x_se`; folder: of the first."""

    label: str
    repeats: int
    summary: Row
    folder: Folder


def write_recipe_report(run_dir: Path, recipe: Mapping[str, Any]) -> Path:
    """Write `report.html` of a recipe's folder; returns its path. Raises DiskError.

    recipe: of `workflow.recipe.facts`: its name, its variables, the outcome of each step (`steps`),
    and the folders to compare (`report`).
    """
    names = cleaned({key: recipe[key] for key in ("recipe", "description", "vars", "repeat")})
    steps = _steps(run_dir, recipe["steps"])
    models = [_model(row["label"], row["folders"]) for row in recipe["report"] if row["folders"]]
    folders = [step.folder for step in steps]
    tables = [
        _comparison(models),
        *(table for folder in folders for table in folder.tables),
        *(_of_step(step, win_rates(step.folder)) for step in steps),
    ]
    body = {
        "kicker": cleaned(str(run_dir)),
        "description": names["description"],
        "verdict": _verdict(models, folders),
        "tiles": _tiles(models, steps),
        "pictures": _key_pictures(folders),
        "tables": [table for table in tables if table is not None],
        "samples": _samples(models),
        "steps_table": _steps_table(steps),
        "steps": [_details(step) for step in steps],
        "variables": facts(
            "Values of this run", ("variable", "value"), {**names["vars"], **names["repeat"]}
        ),
    }
    return write_page(run_dir, "recipe.html.j2", f"Recipe {names['recipe']}", body)


def _steps(run_dir: Path, outcomes: Sequence[Row]) -> list[Step]:
    """The steps in order, grouped with their repeats."""
    groups: dict[str, list[Row]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome["step"], []).append(outcome)
    return [_one_step(run_dir, name, group) for name, group in groups.items()]


def _one_step(run_dir: Path, name: str, group: Sequence[Row]) -> Step:
    folder = read_folder(Path(group[0]["folder"]))
    inputs = read_object(run_dir / f"{group[0]['label']}.json").get("inputs")
    overrides = inputs.get("overrides", []) if isinstance(inputs, dict) else []
    words = ["dpo-run", *(["-m"] if folder.sweep else []), *map(str, overrides)]
    done = Counter(_DONE[str(outcome["action"])] for outcome in group)
    several = len(done) > 1 or len(group) > 1
    times = [outcome["total_seconds"] for outcome in group]
    known = [seconds for seconds in times if is_number(seconds)]
    return Step(
        label=name,
        repeats=len(group),
        status=", ".join(f"{n} {word}" if several else word for word, n in done.items()),
        seconds=sum(known) if len(known) == len(times) else None,
        command=folder.commands[0] if folder.commands else shlex.join(words),
        folder=folder,
    )


def _model(name: str, paths: Sequence[str]) -> Model:
    folders = [read_folder(Path(path)) for path in paths]
    summaries = [folder.summary for folder in folders]
    return Model(str(cleaned(name)), len(folders), averaged(summaries), folders[0])


def averaged(summaries: Sequence[Row]) -> Row:
    """Means of the numbers in all summaries, with standard deviations (n - 1) as `x_se`."""
    if len(summaries) == 1:
        return summaries[0]
    means: Row = {}
    for name in summaries[0]:
        values = [summary.get(name) for summary in summaries]
        numbers = [value for value in values if is_number(value)]
        if len(numbers) == len(values) and not name.endswith("_se"):
            means |= {name: statistics.fmean(numbers), f"{name}_se": statistics.stdev(numbers)}
    return means


def _comparison(models: Sequence[Model]) -> Table | None:
    table = comparison([model.label for model in models], [model.summary for model in models])
    most = max((model.repeats for model in models), default=1)
    if table is not None and not comparable(models[0], models[-1]) and models[0] != models[-1]:
        table = replace(table, caption=f"{table.caption}; a loss is each method's own")
    if table is None or most == 1:
        return table
    return replace(table, caption=f"Means of {count(most, 'run')}, ± standard deviations")


def _of_step(step: Step, table: Table | None) -> Table | None:
    return table and replace(table, caption=f"{step.label}. {table.caption}")


def _verdict(models: Sequence[Model], folders: Sequence[Folder]) -> str:
    """The findings of a frontier, otherwise the first compared model against the last."""
    frontiers = [folder for folder in folders if folder.stage == "frontier"]
    if frontiers:
        return verdict_of(frontiers[-1], {})
    if not models:
        return ""
    if several(models):
        return _verdict_of_each(models)
    first, last = models[0], models[-1]
    clauses = []
    compared = comparable(first, last)
    for metric in _VERDICT:
        name = shown_name(last.folder, metric)
        now = name and last.summary.get(name)
        if name and is_number(now):
            was = first.summary.get(name) if compared else None
            start = f"from {figure(name, was)} to " if is_number(was) else ""
            words = lower(words_of(last.folder, name).partition(" (")[0])
            context = bracketed(interval(name, last.summary))
            context += "" if compared else bracketed(before(name, last.summary))
            clauses.append(f"{words} {start}{with_unit(name, now)}{context}")
    who = f"From {first.label} to {last.label}" if compared else last.label
    return f"{who}: {', '.join(clauses[:3])}." if clauses else ""


def _verdict_of_each(models: Sequence[Model]) -> str:
    """The main figure of every model, with its KL: none of several alternatives is the outcome."""
    for metric in _VERDICT:
        name = shown_name(models[0].folder, metric)
        if name and all(is_number(model.summary.get(name)) for model in models):
            figures = [f"{m.label} {figure(name, m.summary[name])}{_at_kl(m)}" for m in models]
            return f"{words_of(models[0].folder, name)}: {', '.join(figures)}."
    return ""


def _at_kl(model: Model) -> str:
    kl = model.summary.get("kl")
    return f" (KL {figure('kl', kl)})" if is_number(kl) else ""


def several(models: Sequence[Model]) -> bool:
    """Whether there are alternatives: more than two models whose figures are comparable."""
    return len(models) > 2 and all(comparable(models[0], model) for model in models[1:])


def comparable(first: Model, last: Model) -> bool:
    """Whether figures with the same name are comparable: SFT's loss is not DPO's, and a policy's
    accuracy is not a reward model's."""
    methods = [(m.folder.stage, method_of(m.folder)) for m in (first, last)]
    return first != last and methods[0] == methods[1]


def _tiles(models: Sequence[Model], steps: Sequence[Step]) -> list[Tile]:
    """Figures of the last compared model, each beside the first model's, unless there are several
    alternatives; the time of all steps."""
    tiles: list[Tile] = [Tile("Models", str(len(models)), "below")] if several(models) else []
    if models and not tiles:
        first, last = models[0], models[-1]
        averaged_folder = replace(last.folder, summary=last.summary)
        for tile, metric in ((tile_of(averaged_folder, metric), metric) for metric in TILES):
            was = first.summary.get(shown_name(averaged_folder, metric) or "")
            if tile is not None:
                known = comparable(first, last) and is_number(was)
                note = f"{first.label}: {figure(metric, was)}" if known else tile.note
                tiles.append(replace(tile, note=note))
        tiles = tiles or tiles_of(last.folder)
    seconds = [step.seconds for step in steps if step.seconds is not None]
    ran = "all steps" if len(seconds) == len(steps) else f"{len(seconds)} of {len(steps)} steps"
    time = [Tile("Minutes", minutes(sum(seconds)), ran)] if seconds else []
    return tiles[: MAX_TILES - len(time)] + time


def _key_pictures(folders: Iterable[Folder]) -> list[Picture]:
    """The pictures of all steps, the frontier first, each once."""
    pictures = {p.uri: p for folder in folders for p in pictures_of(folder, KEY)}
    return sorted(pictures.values(), key=lambda picture: KEY.index(picture.name))


def _samples(models: Sequence[Model]) -> Samples | None:
    groups = [(model.label, first_by_prompt(completions_of(model.folder))) for model in models]
    return side_by_side("Completions of the same prompts", groups) if groups else None


def _steps_table(steps: Sequence[Step]) -> Table:
    columns = [Column(n, numeric=n == "Minutes") for n in ("Step", "Status", "Minutes", "Command")]
    rows = [
        [_named(step), step.status, NOTHING if step.seconds is None else minutes(step.seconds),
         step.command]
        for step in steps
    ]  # fmt: skip
    return Table("Steps", columns, rows, "Minutes spent on what is in the folders, in any start")


def _named(step: Step) -> str:
    return step.label if step.repeats == 1 else f"{step.label} x{step.repeats}"


def _details(step: Step) -> dict[str, Any]:
    """The page of a step's first repeat, without the pictures shown above."""
    pictures = pictures_of(step.folder, ("overview",))
    parts = run_parts(step.folder)
    if step.repeats > 1:
        parts["verdict"] = f"The first of {step.repeats}: {lower(parts['verdict'])}"
    return {"label": _named(step), **parts, "pictures": pictures}
