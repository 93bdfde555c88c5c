"""Read points.jsonl of several evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config.stages.evaluate import NOT_TRAINED
from dpo_cli.durable.stored import yaml_of_run
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.session.lengths import new_tokens_of

OPTIMUM, BEST_OF = NOT_TRAINED
Point = dict[str, Any]  # a line of points.jsonl


def distinct_folders(folders: Sequence[str]) -> list[Path]:
    """The folders without duplicates, in order of first appearance."""
    return list({Path(folder).resolve(): Path(folder) for folder in folders}.values())


def refuse_mixed(folders: Sequence[Path]) -> None:
    """ConfigError for evaluations with different rewards or token limits, whose rewards cannot be
    compared."""
    first: tuple[Path, Any] | None = None
    for folder in folders:
        stored = yaml_of_run(folder / "config.yaml")
        if not isinstance(stored.get("reward_fn"), dict):
            continue
        reward = {k: v for k, v in stored["reward_fn"].items() if k != "batch_size"}
        if reward.get("path"):
            reward["path"] = str(Path(reward["path"]).resolve())
        facts = {
            "reward_fn": reward,
            "stage.max_new_tokens": new_tokens_of(folder, stored.get("stage", {})),
        }
        if first is None:
            first = folder, facts
        for key, value in facts.items():
            if value != first[1][key]:
                raise ConfigError(
                    f"stage.evaluations: {first[0]} and {folder} differ in {key} "
                    f"({first[1][key]} and {value}); plot them separately"
                )


def read_points(folder: Path) -> list[Point]:
    """Rows of an evaluation's points.jsonl, with its folder as `evaluation`. Raises DataError."""
    path = folder / "points.jsonl"
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            known = {name: row[name] for name in ("method", "reward", "kl", "setting")}
            rows.append({**row, **known, "evaluation": str(folder)})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: is not a point ({error!r})") from error
    return rows


def measured_once(rows: Sequence[Point], note: Callable[[str], None]) -> list[Point]:
    """Keep only the last point of a policy that several evaluations measured."""
    latest: dict[tuple[Any, ...], int] = {}
    for index, row in enumerate(rows):
        latest[identity(row) or (index,)] = index
    distinct = [rows[index] for index in sorted(latest.values())]
    if duplicates := len(rows) - len(distinct):
        points = "point is" if duplicates == 1 else "points are"
        note(f"{duplicates} {points} dropped: a later evaluation has the same policy")
    return distinct


def identity(row: Point) -> tuple[Any, ...] | None:
    """Identifies a trained policy across evaluations; None for other points."""
    policy = row.get("policy")
    if not policy or row["method"] in (OPTIMUM, BEST_OF):
        return None
    path = Path(policy)
    source = str(path.resolve()) if path.is_dir() else policy
    return row["method"], source.removesuffix("/final"), row.get("step")
