"""Decide whether a task of a recipe or a job of a sweep is run, resumed or skipped, by the record
of a task:

<run_dir>/02-dpo-0.json   status   started | done
                          inputs   overrides, files, outputs of the used tasks, version
                          outputs  their identity, once finished
                          seconds  total over all starts with these inputs
                          finished_seconds   those of the last finished run
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli import __version__
from dpo_cli.config.hints import path_keys
from dpo_cli.config.hydra import parsed, values
from dpo_cli.durable import file_digest
from dpo_cli.durable.redact import redact
from dpo_cli.errors import ConfigError
from dpo_cli.run_folder import JOBS, SWEEP, is_used, read_json
from dpo_cli.workflow.expand import Folders, Task, resolve
from dpo_cli.workflow.file import Recipe

HASHED_BYTES = 16 * 2**20  # larger files are compared by name and size; metrics reveal the rest
PENDING = "not there yet"  # identity of a step that has not run
OUTPUT_NAMES = ("summary.json", "sweep.csv")  # besides *.jsonl and the files of final/


@dataclass(frozen=True)
class Decision:
    """What to do with a task or job, and why."""

    action: str  # run | resume | skip
    reason: str


def record_of(task: Task, run_dir: Path) -> dict[str, Any]:
    """The record of the task's last start; empty if it never started."""
    return read_json(run_dir / f"{task.label}.json")


def examine(
    recipe: Recipe, task: Task, run_dir: Path, folders: Folders
) -> tuple[dict[str, Any], Decision]:
    """The task's current inputs, and what to do with it. folders: those of the earlier tasks.
    Raises ConfigError."""
    overrides, uses = resolve(recipe, task, folders)
    inputs = {
        "overrides": overrides,
        "files": outside_files(overrides, run_dir),
        "uses": {title: identity(folder) for title, folder in uses.items()},
        "version": __version__,
    }
    folder, record = run_dir / task.label, record_of(task, run_dir)
    if record:
        outputs = record["outputs"] if record["status"] == "done" else None
        changes = _changes(redact(record["inputs"]), redact(inputs))
        return inputs, decide(folder, changes, outputs)
    if is_used(folder):
        raise ConfigError(f"{folder}: not written by this recipe; move it or change run_dir")
    return inputs, Decision("run", "")


def decide(folder: Path, changes: str, outputs: str | None) -> Decision:
    """What to do with a task of a recipe or a job of a sweep that was started before.

    changes: how its inputs differ from those of that start, "" if they do not. outputs: identity
    of its outputs when it finished; None if it did not.
    """
    if changes:
        return Decision("run", f"again, {changes}")
    if outputs is not None:
        if outputs == identity(folder):
            return Decision("skip", "finished earlier with the same inputs")
        return Decision("run", "again, its outputs were changed or removed")
    if any(folder.glob("checkpoints/step-*")):
        return Decision("resume", "it was interrupted")
    if (folder / SWEEP).is_file():
        return Decision("resume", f"its sweep did not finish, jobs done: {jobs_done(folder)}")
    return Decision("run", "again, it did not finish")


def jobs_done(folder: Path) -> int:
    """The number of jobs of a sweep that succeeded."""
    return sum(read_json(path).get("exit_code") == 0 for path in (folder / JOBS).glob("*.json"))


def _changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The differences between two inputs, for messages."""
    old, new = before["overrides"], after["overrides"]
    parts = [f"now {_clipped(word)}" for word in new if word not in old]
    parts += [f"no longer {_clipped(word)}" for word in old if word not in new]
    if not parts and old != new:
        parts = ["its overrides have another order"]
    for name, now in after["uses"].items():
        if before["uses"].get(name, now) != now:
            parts.append(f"{name} has changed" if now != PENDING else f"{name} runs again")
    parts += [
        f"the content of {path} has changed"
        for path, now in after["files"].items()
        if before.get("files", {}).get(path, now) != now
    ]
    if before["version"] != after["version"]:
        parts.append(f"dpo-run {before['version']} -> {after['version']}")
    return first_few(parts)


def first_few(parts: Sequence[str]) -> str:
    """A shortened list: `a, b, c and 17 more`."""
    rest = f" and {len(parts) - 3} more" if len(parts) > 4 else ""
    return ", ".join(parts[:3] if rest else parts) + rest


def _clipped(word: str) -> str:
    return word if len(word) <= 100 else f"{word[:97]}..."


def outside_files(overrides: Sequence[str], run_dir: Path) -> dict[str, str]:
    """Digests of the files and folders that a step reads and that no earlier step wrote."""
    digests: dict[str, str] = {}
    for word in parsed(overrides):
        for value in values(word) if word.key_or_group in path_keys() else ():
            path = Path(str(value)).expanduser()
            if path.exists() and not path.resolve().is_relative_to(run_dir.resolve()):
                digests[str(path)] = _digest(path)
    return digests


def _digest(path: Path) -> str:
    """Digest of a file, of a folder's files that are not hidden, or of a run's final model."""
    if any((path / "final" / name).is_file() for name in ("config.json", "adapter_config.json")):
        path = path / "final"
    below = sorted(path.rglob("*")) if path.is_dir() else [path]
    lines = [
        f"{name} {p.stat().st_size} {_content(p)}"
        for p, name in ((p, p.relative_to(path)) for p in below)
        if p.is_file() and not any(part.startswith(".") for part in name.parts)
    ]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _content(path: Path) -> str:
    """A digest of a file; of a large one, its modification time."""
    status = path.stat()
    return file_digest(path) if status.st_size <= HASHED_BYTES else str(status.st_mtime_ns)


def identity(folder: Path) -> str:
    """A digest of a step's outputs: names, sizes and, of smaller files, contents."""
    if not folder.is_dir():
        return PENDING
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_output = name.suffix == ".jsonl" or name.name in OUTPUT_NAMES
        if not path.is_file() or not (is_output or "final" in name.parts[:-1]):
            continue
        size = path.stat().st_size
        content = file_digest(path) if size <= HASHED_BYTES else ""
        digest.update(f"{name.as_posix()} {size} {content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
