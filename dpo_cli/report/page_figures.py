"""The main figures of a run, and its pictures with descriptions."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.config import STAGES
from dpo_cli.report.numbers import (
    before,
    count,
    figure,
    interval,
    is_number,
    label_of,
    lower,
    with_unit,
)
from dpo_cli.report.page_read import Folder, Row
from dpo_cli.report.page_story import best_point, level_with, path_name, point_name, trained

MAX_TILES = 6

# Of these a report shows the first it has, held-out figures before those of the last steps.
TILES = (
    "reward", "score", "kl", "accuracy", "win_rate", "rewards/accuracies", "loss", "perplexity",
    "ece", "rewards/margins", "shortfall", "finished", "distinct_2",
)  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A main figure: its label, its value, and its interval or value before training."""

    label: str
    value: str
    note: str = ""


def tiles_of(folder: Folder) -> list[Tile]:
    """The first figures of TILES that the run has."""
    summary = folder.summary
    rates = [name for name in summary if re.fullmatch(r"win_rate_t[\d.e-]+", name)][:2]
    tiles = [
        tile
        for name in TILES
        for metric in (rates if name == "win_rate" else [name])
        if (tile := tile_of(folder, metric)) is not None
    ]
    if len(trained(folder.points)) > 1:
        tiles = _point_tiles(folder.points) + tiles
    return tiles[:MAX_TILES]


def shown_name(folder: Folder, metric: str) -> str | None:
    """`eval/loss` of a run with held-out rows, otherwise `loss`, of the last training batches; None
    if the run has no such figure."""
    held_out = any(name.startswith("eval/") for name in folder.summary)
    name = f"eval/{metric}" if held_out else metric
    return name if is_number(folder.summary.get(name)) else None


def words_of(folder: Folder, name: str) -> str:
    """The label of a figure; in a training run with a mark if it is of training batches."""
    words = label_of(name, folder.summary)
    spec = STAGES.get(folder.stage)
    training = spec is not None and spec.trains and not name.startswith("eval/")
    return f"Training {lower(words)}" if training else words


def tile_of(folder: Folder, metric: str) -> Tile | None:
    summary, name = folder.summary, shown_name(folder, metric)
    if name is None:
        return None
    error, bounds = summary.get(f"{name}_se"), interval(name, summary)
    note = before(name, summary)
    if is_number(error):
        _, _, margin = figure(name, summary[name], error).partition("±")
        note = f"±{margin} standard error"
    if bounds:
        note = "; ".join(filter(None, (bounds, before(name, summary))))
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
                Tile("Gap to the optimum", figure("reward", best["shortfall"]), "at that KL")
            )
    return tiles


TITLES = {  # in the order of a page; single panels are also in overview.png
    "frontier": "Frontier",
    "win_rates": "Win rates",
    "held_out_rewards": "Ranking and calibration",
    "overview": "Training curves",
}
NARROW = "_narrow"  # as plots.py ends their names; it imports matplotlib, which is slow
KEY = tuple(name for name in TITLES if name != "overview")
DPI = 150  # of the files; an inch of CSS has 96 pixels
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CURVES = ("loss", "rewards/accuracies", "rewards/margins", "score", "kl", "ece")


@dataclass(frozen=True)
class Picture:
    """width, height: in pixels of CSS."""

    name: str
    title: str
    alt: str
    uri: str
    width: int
    height: int
    narrow: str | None = None  # the URI of the same picture for a phone's screen


def pictures_of(folder: Folder, names: tuple[str, ...] = tuple(TITLES)) -> list[Picture]:
    """The named pictures that the run drew."""
    pictures = []
    for name in names:
        png = folder.pictures.get(name, b"")
        if not _is_png(png):
            continue
        width, height = struct.unpack(">II", png[16:24])
        width, height = (round(pixels * 96 / DPI) for pixels in (width, height))
        other = folder.pictures.get(f"{name}{NARROW}", b"")
        narrow = _uri(other) if _is_png(other) else None
        alt = alt_of(name, folder)
        pictures.append(Picture(name, TITLES[name], alt, _uri(png), width, height, narrow))
    return pictures


def _is_png(content: bytes) -> bool:
    return content.startswith(_SIGNATURE) and len(content) >= 24


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def alt_of(name: str, folder: Folder) -> str:
    """Alternative text: what the picture shows, with its main numbers."""
    parts = {
        "frontier": _frontier,
        "win_rates": _win_rates,
        "held_out_rewards": _held_out_rewards,
        "overview": _overview,
    }[name](folder)
    return "; ".join(parts) + "."


def _overview(folder: Folder) -> list[str]:
    parts = [f"Curves over {count(folder.last_step, 'training step')}"]
    for metric in _CURVES:
        parts += [_change(folder.summary, name) for name in (metric, f"eval/{metric}")]
    return [part for part in parts if part]


def _change(summary: Row, name: str) -> str:
    value, before = summary.get(name), summary.get(f"first/{name}")
    if not is_number(value):
        return ""
    start = f"from {figure(name, before)} to " if is_number(before) else "ends at "
    return f"{lower(label_of(name, summary))} {start}{figure(name, value)}"


def _held_out_rewards(folder: Folder) -> list[str]:
    parts = ["Histograms of the rewards of chosen and rejected responses, and their calibration"]
    means = [("chosen", "eval/rewards/chosen"), ("rejected", "eval/rewards/rejected")]
    parts += [
        f"mean reward of {kind} responses {figure(name, folder.summary[name])}"
        for kind, name in means
        if is_number(folder.summary.get(name))
    ]
    return [*parts, *filter(None, [_change(folder.summary, "eval/ece")])]


def _frontier(folder: Folder) -> list[str]:
    policies = trained(folder.points)
    parts = [f"Reward against KL of {count(len(policies), 'policy', 'policies')}"]
    for method in dict.fromkeys(str(row.get("method")) for row in policies):
        best = best_point([row for row in policies if str(row.get("method")) == method])
        if best is not None:
            reward = figure("reward", best["reward"])
            where = f" at {with_unit('kl', best['kl'])}" if is_number(best.get("kl")) else ""
            parts.append(f"{point_name(best)} reaches {reward}{where}")
    return parts


def _win_rates(folder: Folder) -> list[str]:
    return ["Win rates"] + [
        f"{path_name(str(row.get('policy')))} against {row.get('opponent')} at temperature "
        f"{row.get('temperature')}: {figure('win_rate', row['win_rate'])}"
        for row in folder.win_rates[:12]
        if is_number(row.get("win_rate"))
    ]
