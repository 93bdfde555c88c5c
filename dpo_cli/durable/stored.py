"""Read the files of an earlier run, which may have been edited, without crashing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_cli.durable.bounded_yaml import read_yaml
from dpo_cli.errors import DataError


def stored_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty if there is no file.

    Raises DataError for a file with anything else, OSError for one that cannot be read.
    """
    return _mapping(path, read_yaml)


def yaml_of_run(path: Path) -> dict[str, Any]:
    """As `stored_yaml`, but also empty for an invalid file: the folder may not be a run's."""
    try:
        return stored_yaml(path)
    except DataError:
        return {}


def stored_json(path: Path) -> dict[str, Any]:
    """As `stored_yaml`, for the object in a JSON file."""
    return _mapping(path, lambda path: json.loads(path.read_text(encoding="utf-8")))


def _mapping(path: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    try:
        content = read(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}; restore or remove it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected keys and values; restore or remove it")
    return content
