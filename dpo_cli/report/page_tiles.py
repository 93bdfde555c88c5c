"""The few figures of a run to see first, each with what it is and what it was before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.config import STAGES
from dpo_cli.report.page_read import Folder, Row
from dpo_cli.report.page_story import best_point, level_with, point_name, trained
from dpo_cli.report.page_text import count, figure, is_number, label, lower

MOST_TILES = 6

# Of these a report shows the first it has, held-out figures before those of the last steps.
TILES = (
    "reward", "score", "kl", "accuracy", "win_rate", "rewards/accuracies", "loss", "perplexity",
    "ece", "rewards/margins", "shortfall", "finished", "distinct_2",
)  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A figure to see first, with what it is and what it was before."""

    label: str
    value: str
    note: str = ""


def tiles_of(folder: Folder) -> list[Tile]:
    """The first figures of TILES that the run has."""
    summary = folder.summary
    rates = [name for name in summary if re.fullmatch(r"win_rate_t[\d.e-]+", name)][:2]
    found = [
        tile
        for name in TILES
        for metric in (rates if name == "win_rate" else [name])
        if (tile := tile_of(folder, metric)) is not None
    ]
    if len(trained(folder.points)) > 1:
        found = _point_tiles(folder.points) + found
    return found[:MOST_TILES]


def shown_name(folder: Folder, metric: str) -> str | None:
    """`eval/loss` of a run with held-out rows, whose training figures are of its last batches;
    None where it has no such figure."""
    held_out = any(name.startswith("eval/") for name in folder.summary)
    name = f"eval/{metric}" if held_out else metric
    return name if is_number(folder.summary.get(name)) else None


def words_of(folder: Folder, name: str) -> str:
    """A figure's label; of a run that trains, whether it is of training or of held-out rows."""
    words = label(name)
    spec = STAGES.get(folder.stage)
    training = spec is not None and spec.trains and not name.startswith("eval/")
    return f"Training {lower(words)}" if training else words


def tile_of(folder: Folder, metric: str) -> Tile | None:
    summary, name = folder.summary, shown_name(folder, metric)
    if name is None:
        return None
    before = summary.get(f"first/{name}")
    error, low, high = (summary.get(f"{name}_{bound}") for bound in ("se", "low", "high"))
    note = f"{figure(name, before)} before" if is_number(before) else ""
    if is_number(error):
        _, _, margin = figure(name, summary[name], error).partition("±")
        note = f"±{margin} standard error"
    if is_number(low) and is_number(high):
        was = f"; {note}" if is_number(before) else ""
        note = f"{figure(name, low)} to {figure(name, high)}{was}"
    return Tile(words_of(folder, name), figure(name, summary[name]), note)


def _point_tiles(points: Sequence[Row]) -> list[Tile]:
    policies = trained(points)
    best = best_point(policies)
    tiles = [
        Tile(
            "Policies",
            f"{len(policies):,}",
            count(len({r.get("method") for r in policies}), "method"),
        )
    ]
    if best is not None:
        note = point_name(best)
        if level_with(best, policies) is not None:
            note += f": the highest of {len(policies)}, within the noise"
        tiles.append(Tile("Highest reward", figure("reward", best["reward"]), note))
        if is_number(best.get("kl")):
            tiles.append(Tile("Its KL (nats)", figure("kl", best["kl"]), "to the reference"))
        if is_number(best.get("shortfall")):
            tiles.append(
                Tile("Short of the optimum by", figure("reward", best["shortfall"]), "at that KL")
            )
    return tiles
