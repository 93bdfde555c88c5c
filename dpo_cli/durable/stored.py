"""What the files of an earlier run say: whoever changed them must not crash this one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_cli.durable.bounded_yaml import read_yaml
from dpo_cli.errors import DataError


def stored_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; none where it is not there.

    Raises DataError for a file with anything else, OSError for one that cannot be read.
    """
    return _mapping(path, read_yaml)


def yaml_of_run(path: Path) -> dict[str, Any]:
    """As `stored_yaml`; none either where the folder may not be a run's, and the file is not."""
    try:
        return stored_yaml(path)
    except DataError:
        return {}


def stored_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; as `stored_yaml`."""
    return _mapping(path, lambda place: json.loads(place.read_text(encoding="utf-8")))


def _mapping(path: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    try:
        found = read(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}; restore or remove it") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected keys and values; restore or remove it")
    return found
