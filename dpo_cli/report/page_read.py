"""What a run's folder holds, for its report: read leniently, without secrets.

A file that is missing, torn or of another shape counts as empty: the run is over, and its
report shows what there is.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.report.files import redact, without_home

Row = dict[str, Any]
MOST_ROWS = 5000  # read of a JSON-lines file: more than a report shows


@dataclass(frozen=True)
class Folder:
    """A run: its papers, figures, rows and pictures."""

    path: Path
    summary: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    config_text: str = ""
    commands: list[str] = field(default_factory=list)
    versions: Row = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    win_rates: list[Row] = field(default_factory=list)
    points: list[Row] = field(default_factory=list)
    frontier: str = ""  # frontier.md
    sweep: list[Row] = field(default_factory=list)
    last_step: int = 0
    verdicts: list[Row] = field(default_factory=list)  # of a judge
    pictures: dict[str, bytes] = field(default_factory=dict)  # name -> PNG

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stage(self) -> str:
        return str(self.setting("stage.name", self.summary.get("stage", "")))

    @property
    def findings(self) -> list[str]:
        """The sentences that frontier.md lists."""
        lines = self.frontier.split("\n")
        return [line.removeprefix("- ") for line in lines if line.startswith("- ")]

    def setting(self, key: str, default: Any = None) -> Any:
        """`setting("stage.beta")`; the default where it is not set or null."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None else node


def read_folder(run_dir: Path) -> Folder:
    """All that a report needs of a run or of a sweep."""
    config_text = _text(run_dir / "config.yaml")
    return Folder(
        path=run_dir,
        summary=read_object(run_dir / "summary.json"),
        config=_object(config_text, yaml.safe_load),
        config_text=cleaned(config_text),
        commands=cleaned(_text(run_dir / "command.txt").splitlines()),
        versions=read_object(run_dir / "versions.json"),
        samples=_rows(run_dir / "samples.jsonl"),
        win_rates=_flat(_objects(_parsed(_text(run_dir / "win_rates.json"), json.loads))),
        verdicts=_rows(run_dir / "verdicts.jsonl"),
        points=_flat(_rows(run_dir / "points.jsonl")) or _csv_rows(run_dir / "frontier.csv"),
        frontier=cleaned(_text(run_dir / "frontier.md")),
        sweep=_csv_rows(run_dir / "sweep.csv"),
        last_step=_last_step(run_dir / "metrics.jsonl"),
        pictures=_pictures(run_dir / "plots"),
    )


def read_object(path: Path) -> Row:
    """The object in a JSON file."""
    return _object(_text(path), json.loads)


def _object(text: str, load: Callable[[str], Any]) -> Row:
    value = _parsed(text, load)
    return cleaned(value) if isinstance(value, dict) else {}


def _parsed(text: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None


def cleaned(value: Any) -> Any:
    """Without secrets, the home folder written `~`."""
    return without_home(redact(value))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _rows(path: Path) -> list[Row]:
    """The first objects of a JSON-lines file."""
    lines = _text(path).split("\n")[:MOST_ROWS]  # not splitlines: text may hold U+2028
    rows = [_parsed(line, json.loads) for line in lines]
    return _objects(rows)


def _objects(values: Any) -> list[Row]:
    rows = [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []
    found: list[Row] = cleaned(rows)
    return found


def _flat(rows: list[Row]) -> list[Row]:
    """Rows of a table: what is neither a number nor a text is written as one."""
    plain = (int, float, str, type(None))
    return [{k: v if isinstance(v, plain) else json.dumps(v) for k, v in r.items()} for r in rows]


def _last_step(path: Path) -> int:
    steps = [row.get("step") for row in _tail(path)]
    return max((step for step in steps if isinstance(step, int)), default=0)


def _tail(path: Path) -> list[Row]:
    """The last rows are enough: steps only grow."""
    rows = [_parsed(line, json.loads) for line in _text(path).split("\n")[-8:]]
    return [row for row in rows if isinstance(row, dict)]


def _csv_rows(path: Path) -> list[Row]:
    """Numbers as numbers, empty cells as None."""
    try:
        rows = list(csv.DictReader(_text(path).splitlines()))
    except csv.Error:
        return []
    return _objects([{str(k): _cell(v) for k, v in row.items()} for row in rows])


def _cell(value: Any) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except (TypeError, ValueError):
            continue
    return value or None


def _pictures(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.png")):
        try:
            found[path.stem] = path.read_bytes()
        except OSError:
            continue
    return found
