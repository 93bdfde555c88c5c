"""A run's folder before the run starts: its name, its lock, and the composed configuration."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_cli.config import RunConfig
from dpo_cli.durable import disk_errors, write_text
from dpo_cli.durable.redact import REDACTED, redact
from dpo_cli.durable.temporary import is_leftover, remove_leftovers
from dpo_cli.errors import ConfigError, RunLockedError
from dpo_cli.report import output
from dpo_cli.train.guard import run_lock

COMPOSED = ".hydra"  # Hydra's own name for the folder of the composed configuration
OVERRIDES = "overrides.yaml"
LOCK = ".lock"
SWEEP = "sweep.json"  # what a sweep was started with, in its folder
JOBS = "jobs"  # beside it: how each job ended
LONGEST_NAME = 60  # characters of each of three in the name of a folder, which may have 255
STALE = {
    "config.yaml", "command.txt", "versions.json", "metrics.jsonl", "tensorboard", output.LOG
}  # fmt: skip
KEPT = {
    COMPOSED,
    LOCK,
    "wandb",
    "wandb_run_id.txt",
}  # with them all that a start writes before work


def unique_name() -> str:
    """`<time>-<4 hex>`: runs started in the same second need different folders."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def default_run_dir(config: RunConfig) -> Path:
    names = [config.stage.name, config.model.name, config.data.name]
    return Path("runs", "-".join([*map(_slug, names), unique_name()]))


def _slug(name: str) -> str:
    """A name as part of a folder's name: no separators, no leading dots, not too long."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name[:LONGEST_NAME]).strip(".-") or "unnamed"


def is_used(folder: Path) -> bool:
    """Whether there is anything but a lock and what a killed process left half-written."""
    return folder.exists() and (not folder.is_dir() or bool(_names(folder) - {LOCK}))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not is_leftover(path.name)}


def check_free(folder: Path, resume: bool) -> None:
    """Raise ConfigError unless a run may start there (resume: or continue), RunLockedError if one
    is running."""
    if not is_used(folder):
        return
    refuse_locked(folder)
    if is_bare(folder):
        return
    is_run = _is_run(folder)
    if resume and not is_run:
        raise ConfigError(f"run_dir={folder}: is not a run folder; choose another to resume")
    if not resume:
        other = "choose another run_dir"
        remedy = f"continue it with dpo-run resume={folder}, or {other}" if is_run else other
        raise ConfigError(f"run_dir={folder}: is not empty; {remedy}")


def is_bare(folder: Path) -> bool:
    """Whether the folder holds at most the files of a start that failed before any work."""
    if not is_used(folder):
        return True
    if not folder.is_dir():
        return False
    names, metrics = _names(folder), folder / "metrics.jsonl"
    ours = _is_run(folder) or names <= KEPT
    return ours and names <= STALE | KEPT and not (metrics.exists() and metrics.stat().st_size)


def remove_bare(folder: Path) -> None:
    """Remove the files of a failed start, if there is nothing else; and `runs/`, if that is empty
    then."""
    if not (folder.is_dir() and is_bare(folder)):
        return
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not empty
        folder.parent.rmdir()


def refuse_locked(folder: Path) -> None:
    """Raise RunLockedError if another process uses the folder."""
    if (folder / LOCK).exists():  # asking creates the file, so ask only in run folders
        with run_lock(folder):
            pass


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder whose lock is held, and in those
    below that have no lock of their own."""
    below = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    for place in (folder, *below):
        if place == folder or not (place / LOCK).exists():
            remove_leftovers(place, alone=True)


def set_aside(folder: Path, stem: Path) -> None:
    """Rename a folder to `<stem>-1`, `-2`, ..., whichever is free: it may hold a model."""
    clear_leftovers(folder)
    number = 1
    while (old := stem.with_name(f"{stem.name}-{number}")).exists():
        number += 1
    make(stem.parent)
    with disk_errors(folder):
        folder.rename(old)


def make(folder: Path) -> None:
    """Create a folder, or say in one line why not (exit code 74)."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def claimed(folder: Path, cfg: DictConfig, resume: bool) -> Iterator[None]:
    """Hold the folder, with the composed configuration stored in it.

    cfg: the whole config with Hydra's node; stored unresolved, so that values taken from
    the environment stay there. A resumed run keeps what it was started with. The papers of a
    start that failed make way.
    """
    make(folder)
    with run_lock(folder):
        if is_bare(folder):
            _clear(folder)
            _store(folder / COMPOSED, cfg)
        elif not resume:  # started and ended since we looked
            raise RunLockedError(f"{folder}: another run has just used it; choose another run_dir")
        yield


def _clear(folder: Path) -> None:
    """Remove the files of an earlier start, its marks last: killed before that, it is still one."""
    with disk_errors(folder):
        for path in folder.iterdir():
            if path.name in STALE and path.is_dir():
                shutil.rmtree(path)
            elif path.name in STALE:
                path.unlink()
        (folder / COMPOSED / OVERRIDES).unlink(missing_ok=True)


def _is_run(folder: Path) -> bool:
    return (folder / COMPOSED / OVERRIDES).is_file()  # written last, removed first


def _store(folder: Path, cfg: DictConfig) -> None:
    make(folder)
    parts = {
        "config": OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]),
        "hydra": OmegaConf.masked_copy(cfg, ["hydra"]),
        "overrides": cfg.hydra.overrides.task,
    }
    for name, part in parts.items():
        write_text(folder / f"{name}.yaml", OmegaConf.to_yaml(without_secrets(part)))


def without_secrets(config: Any) -> Any:
    """A configuration with secrets blanked and interpolations unresolved. Its YAML would fold and
    quote a secret, which could then not be found."""
    return OmegaConf.create(redact(OmegaConf.to_container(config, resolve=False)))


def task_overrides(cfg: DictConfig) -> list[str]:
    """The user's overrides without Hydra's own; interpolations are not resolved."""
    return _words(cfg.hydra.overrides.task)


def composed_with(cfg: DictConfig) -> list[str]:
    """The arguments beside the overrides that compose the same configuration again."""
    words = _words(cfg.hydra.overrides.hydra)
    name = cfg.hydra.job.config_name
    return [word for word in words if key_of(word) == "hydra.searchpath"] + (
        ["--config-name", name] if name != "config" else []
    )


def _words(node: Any) -> list[str]:
    words = OmegaConf.to_container(node, resolve=False)
    return [str(word) for word in words] if isinstance(words, list) else []


def stored_overrides(folder: Path) -> list[str]:
    """The overrides a run was started with. Raises ConfigError if it is no run folder."""
    return _words(_load(folder, "overrides"))


def stored_composed_with(folder: Path) -> list[str]:
    return composed_with(_load(folder, "hydra"))


def _load(folder: Path, name: str) -> DictConfig:
    path = folder / COMPOSED / f"{name}.yaml"
    if not folder.is_dir():
        raise ConfigError(f"resume={folder}: no such folder")
    try:
        return OmegaConf.load(path)  # type: ignore[return-value]
    except FileNotFoundError:
        killed = is_bare(folder) and (folder / LOCK).exists()
        remedy = ": its start was killed, start it again by its own command" if killed else ""
        raise ConfigError(f"resume={folder}: not a run folder, it has no {path}{remedy}") from None
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"resume={folder}: cannot read {path}: {error}") from error


def key_of(override: str) -> str:
    """`+a.b=c` -> `a.b`."""
    return override.lstrip("+~").partition("=")[0]


def merge_overrides(stored: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Stored overrides, each replaced by an extra one for the same key. ConfigError for one that
    was stored without its secret and is not replaced."""
    keys = {key_of(word) for word in extra}
    merged = [word for word in stored if key_of(word) not in keys]
    for word in merged:
        if REDACTED in word:
            raise ConfigError(
                f"{key_of(word)}: held a secret, which the run's folder does not keep: add "
                f"{key_of(word)}=<value> to the command"
            )
    return [*merged, *extra]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no readable one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
