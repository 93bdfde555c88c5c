"""report.html of a recipe: what its models came to, side by side, and every step below."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_cli.report.page import run_parts, write_page
from dpo_cli.report.page_frontier import frontier_tables
from dpo_cli.report.page_pictures import KEY, Picture, pictures_of
from dpo_cli.report.page_read import Folder, Row, cleaned, read_folder, read_object
from dpo_cli.report.page_story import interval, method_of, verdict_of
from dpo_cli.report.page_tables import (
    Cell,
    Samples,
    Table,
    comparison,
    completions_of,
    facts,
    first_by_prompt,
    side_by_side,
    win_rates,
)
from dpo_cli.report.page_text import NOTHING, count, figure, is_number, lower, with_unit
from dpo_cli.report.page_tiles import (
    MOST_TILES,
    TILES,
    Tile,
    shown_name,
    tile_of,
    tiles_of,
    words_of,
)

_TOLD = ("reward", "kl", "accuracy", "win_rate", "rewards/accuracies", "loss")
_DONE = {"run": "ran", "resume": "resumed", "skip": "skipped"}


@dataclass(frozen=True)
class Step:
    """A step with all its repeats. folder: of the first; seconds: of all, whenever they ran."""

    label: str
    repeats: int
    status: str
    seconds: float | None
    command: str
    folder: Folder


@dataclass(frozen=True)
class Model:
    """A column of the comparison. summary: of several repeats the means, `x_se` their
    standard deviations; folder: of the first."""

    label: str
    repeats: int
    summary: Row
    folder: Folder


def write_recipe_report(run_dir: Path, recipe: Mapping[str, Any]) -> Path:
    """Write `report.html` of a recipe's folder; returns its path. Raises DiskError.

    recipe: what `recipe.facts` tells: its name, its variables, what became of each step
    (`steps`), and the folders to compare (`report`).
    """
    told = cleaned({key: recipe[key] for key in ("recipe", "description", "vars", "repeat")})
    steps = _steps(run_dir, recipe["steps"])
    models = [_model(row["label"], row["folders"]) for row in recipe["report"] if row["folders"]]
    folders = [step.folder for step in steps]
    tables = [
        _comparison(models),
        *(table for folder in folders for table in frontier_tables(folder)),
        *(_of_step(step, win_rates(step.folder)) for step in steps),
    ]
    body = {
        "kicker": cleaned(str(run_dir)),
        "description": told["description"],
        "verdict": _verdict(models, folders),
        "tiles": _tiles(models, steps),
        "pictures": _key_pictures(folders),
        "tables": [table for table in tables if table is not None],
        "samples": _samples(models),
        "steps_table": _steps_table(steps),
        "steps": [_details(step) for step in steps],
        "variables": facts(
            "Values of this run", ("variable", "value"), {**told["vars"], **told["repeat"]}
        ),
    }
    return write_page(run_dir, "recipe.html.j2", f"Recipe {told['recipe']}", body)


def _steps(run_dir: Path, outcomes: Sequence[Row]) -> list[Step]:
    """One of each step; its repeats differ in what the recipe repeats alone."""
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
    """Means of the numbers that all have, `x_se` their standard deviations (n - 1)."""
    if len(summaries) == 1:
        return summaries[0]
    found: Row = {}
    for name in summaries[0]:
        values = [summary.get(name) for summary in summaries]
        numbers = [value for value in values if is_number(value)]
        if len(numbers) == len(values) and not name.endswith("_se"):
            found |= {name: statistics.fmean(numbers), f"{name}_se": statistics.stdev(numbers)}
    return found


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
    """What a frontier says, else the first and the last of the compared models."""
    frontiers = [folder for folder in folders if folder.stage == "frontier"]
    if frontiers:
        return verdict_of(frontiers[-1], {})
    if not models:
        return ""
    first, last = models[0], models[-1]
    told = []
    compared = comparable(first, last)
    for metric in _TOLD:
        name = shown_name(last.folder, metric)
        now = name and last.summary.get(name)
        if name and is_number(now):
            was = first.summary.get(name) if compared else None
            start = f"from {figure(name, was)} to " if is_number(was) else ""
            words = lower(words_of(last.folder, name).partition(" (")[0])
            before = "" if compared else _before(last.summary, name)
            told.append(
                f"{words} {start}{with_unit(name, now)}{interval(last.summary, name)}{before}"
            )
    who = f"From {first.label} to {last.label}" if compared else last.label
    return f"{who}: {', '.join(told[:3])}." if told else ""


def comparable(first: Model, last: Model) -> bool:
    """Whether a figure of one name is the same thing of both: the loss of SFT is no DPO's, and an
    accuracy is one thing in training and another by a reward model."""
    ways = [(m.folder.stage, method_of(m.folder)) for m in (first, last)]
    return first != last and ways[0] == ways[1]


def _before(summary: Row, name: str) -> str:
    """` (50.0% before)`: the run's own start."""
    was = summary.get(f"first/{name}")
    return f" ({figure(name, was)} before)" if is_number(was) else ""


def _tiles(models: Sequence[Model], steps: Sequence[Step]) -> list[Tile]:
    """Figures of the last compared model, each with the first one's; the time of all."""
    tiles: list[Tile] = []
    if models:
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
    time = [Tile("Minutes", f"{sum(seconds) / 60:.1f}", ran)] if seconds else []
    return tiles[: MOST_TILES - len(time)] + time


def _key_pictures(folders: Iterable[Folder]) -> list[Picture]:
    """Of all steps, the frontier first; each picture once."""
    found = {p.uri: p for folder in folders for p in pictures_of(folder, KEY)}
    return sorted(found.values(), key=lambda picture: KEY.index(picture.name))


def _samples(models: Sequence[Model]) -> Samples | None:
    groups = [(model.label, first_by_prompt(completions_of(model.folder))) for model in models]
    return side_by_side("Completions of the same prompts", groups) if groups else None


def _steps_table(steps: Sequence[Step]) -> Table:
    names = ("Step", "Status", "Minutes", "Command")
    rows = [
        [
            Cell(_named(step), False),
            Cell(step.status, False),
            Cell(NOTHING if step.seconds is None else f"{step.seconds / 60:.1f}", True),
            Cell(step.command, False),
        ]
        for step in steps
    ]
    caption = "Minutes of what is in the folders, whenever it ran"
    return Table("Steps", caption, [Cell(name, name == "Minutes") for name in names], rows)


def _named(step: Step) -> str:
    return step.label if step.repeats == 1 else f"{step.label} x{step.repeats}"


def _details(step: Step) -> dict[str, Any]:
    """A step's own page, the first of its repeats, without the pictures shown above."""
    pictures = pictures_of(step.folder, ("overview",))
    parts = run_parts(step.folder)
    if step.repeats > 1:
        parts["verdict"] = f"The first of {step.repeats}: {lower(parts['verdict'])}"
    return {"label": _named(step), **parts, "pictures": pictures}
