"""The contents of a run's folder, for its report: read leniently, secrets redacted.

A file that is missing, truncated or of another shape counts as empty: the report shows what there
is.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.durable.redact import redact
from dpo_cli.durable.stored import yaml_of_run
from dpo_cli.report.files import without_home
from dpo_cli.report.table import Table

Row = dict[str, Any]
MAX_ROWS = 5000  # read of a JSON-lines file: more than a report shows


@dataclass(frozen=True)
class Folder:
    """A run: its configuration, figures, rows and pictures."""

    path: Path
    summary: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    config_text: str = ""
    commands: list[str] = field(default_factory=list)
    versions: Row = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    win_rates: list[Row] = field(default_factory=list)
    points: list[Row] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)  # sentences of frontier.json
    tables: list[Table] = field(default_factory=list)  # of frontier.json
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

    def setting(self, key: str, default: Any = None) -> Any:
        """`setting("stage.beta")`; the default if it is not set or null."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None else node


def read_folder(run_dir: Path) -> Folder:
    """Everything that a report shows of a run or a sweep."""
    config_text = _text(run_dir / "config.yaml")
    frontier = read_object(run_dir / "frontier.json")
    return Folder(
        path=run_dir,
        summary=read_object(run_dir / "summary.json"),
        config=cleaned(_config(run_dir)),
        config_text=cleaned(config_text),
        commands=cleaned(_text(run_dir / "command.txt").split("\n")[:-1]),
        versions=read_object(run_dir / "versions.json"),
        samples=_rows(run_dir / "samples.jsonl"),
        win_rates=_flat(_objects(_parsed(_text(run_dir / "win_rates.json"), json.loads))),
        verdicts=_rows(run_dir / "verdicts.jsonl"),
        points=_flat(_rows(run_dir / "points.jsonl")) or _csv_rows(run_dir / "frontier.csv"),
        findings=[str(finding) for finding in _list(frontier, "findings")],
        tables=[t for t in map(Table.from_json, _list(frontier, "tables")) if t is not None],
        sweep=_csv_rows(run_dir / "sweep.csv"),
        last_step=_last_step(run_dir / "metrics.jsonl"),
        pictures=_pictures(run_dir / "plots"),
    )


def _config(run_dir: Path) -> Row:
    try:
        return yaml_of_run(run_dir / "config.yaml")
    except OSError:  # a page shows what can be read
        return {}


def read_object(path: Path) -> Row:
    """The object in a JSON file."""
    return _object(_text(path), json.loads)


def _list(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    return value if isinstance(value, list) else []


def _object(text: str, load: Callable[[str], Any]) -> Row:
    value = _parsed(text, load)
    return cleaned(value) if isinstance(value, dict) else {}


def _parsed(text: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(text)
    except (ValueError, RecursionError):
        return None


def cleaned(value: Any) -> Any:
    """The value with secrets redacted and the home folder written `~`."""
    return without_home(redact(value))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _rows(path: Path) -> list[Row]:
    """The first objects of a JSON-lines file."""
    lines = _text(path).split("\n")[:MAX_ROWS]  # not splitlines: text may hold U+2028
    rows = [_parsed(line, json.loads) for line in lines]
    return _objects(rows)


def _objects(values: Any) -> list[Row]:
    rows = [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []
    redacted: list[Row] = cleaned(rows)
    return redacted


def _flat(rows: list[Row]) -> list[Row]:
    """Rows of numbers and texts: other values as JSON text."""
    plain = (int, float, str, type(None))
    return [{k: v if isinstance(v, plain) else json.dumps(v) for k, v in r.items()} for r in rows]


def _last_step(path: Path) -> int:
    steps = [row.get("step") for row in _tail(path)]
    return max((step for step in steps if isinstance(step, int)), default=0)


def _tail(path: Path) -> list[Row]:
    """The last rows of a JSON-lines file, whose steps are ascending."""
    rows = [_parsed(line, json.loads) for line in _text(path).split("\n")[-8:]]
    return [row for row in rows if isinstance(row, dict)]


def _csv_rows(path: Path) -> list[Row]:
    """Numbers as numbers, empty cells as None."""
    try:
        rows = list(csv.DictReader(io.StringIO(_text(path), newline="")))
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
    pictures = {}
    for path in sorted(folder.glob("*.png")):
        try:
            pictures[path.stem] = path.read_bytes()
        except OSError:
            continue
    return pictures
