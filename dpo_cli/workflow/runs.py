"""`dpo-run runs [FOLDER]`: the runs below a folder, newest last: state, main figure, disk."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_cli.durable.stored import yaml_of_run
from dpo_cli.errors import ConfigError
from dpo_cli.report.compare import KEY_METRICS
from dpo_cli.report.numbers import figure, interval, is_number, label
from dpo_cli.report.table import Column, Table
from dpo_cli.run_folder import LOCK, read_json

MAIN = ("win_rate_t1", "accuracy", "eval/score", *KEY_METRICS)  # the first that a run has is shown
MARKS = ("config.yaml", "command.txt")  # files of a run that has begun
MB = 2**20


def runs(words: Sequence[str]) -> int:
    """Print a table of the runs below a folder (default: runs). Changes nothing."""
    if len(words) > 1:
        raise ConfigError(f"runs: one folder at a time, not also {words[1]}")
    root = Path(words[0] if words else "runs")
    if not root.is_dir():
        raise ConfigError(f"runs: {root}: no such folder")
    found = sorted(folders_below(root), key=lambda folder: folder.stat().st_mtime)
    rows = [row_of(folder, root) for folder in found]
    heads = ("run", "state", "stage", "model", "main figure")
    columns = [*map(Column, heads), Column("MB", numeric=True)]
    if not rows:
        print(f"{root}: no runs")
        return 0
    total = sum(row[-1] for row in rows)
    title = f"{len(rows)} runs below {root}, {total:,} MB"
    Console(soft_wrap=False).print(Table(title, columns, rows))
    return 0


def folders_below(root: Path) -> list[Path]:
    """Folders of runs; those inside a run's own files are not looked for."""
    found: list[Path] = []
    for place, names, _ in os.walk(root):
        folder = Path(place)
        if all((folder / name).is_file() for name in MARKS):
            found.append(folder)
            names.clear()
    return found


def row_of(folder: Path, root: Path) -> list[Any]:
    config, summary = yaml_of_run(folder / "config.yaml"), read_json(folder / "summary.json")
    parts = [config.get(name) for name in ("stage", "model")]
    names = [str(part.get("name", "-")) if isinstance(part, dict) else "-" for part in parts]
    size = sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() or p.is_symlink())
    name = str(folder.relative_to(root)) if folder != root else folder.name
    return [name, state_of(folder), *names, main_figure(summary), round(size / MB)]


def state_of(folder: Path) -> str:
    if is_locked(folder):
        return "running"
    if (folder / "summary.json").is_file():
        return "finished"
    steps = [path.name for path in (folder / "checkpoints").glob("step-*")]
    last = max((int(name[5:]) for name in steps if name[5:].isdecimal()), default=None)
    return "stopped, nothing saved" if last is None else f"stopped, saved at step {last}"


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run's lock; the file is not written to."""
    try:
        with (folder / LOCK).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a disk without locks
        return False
    return False


def main_figure(summary: dict[str, Any]) -> str:
    metric = next((name for name in MAIN if is_number(summary.get(name))), None)
    if metric is None:
        return "-"
    value = figure(metric, summary[metric], summary.get(f"{metric}_se"))
    text = f"{label(metric)} {value}"
    bounds = interval(metric, summary)
    return f"{text} ({bounds})" if bounds else text
