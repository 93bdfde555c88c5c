"""A recipe's YAML: read with limits on its size, and its parts checked for their types."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_cli.config.spelling import did_you_mean
from dpo_cli.durable.bounded_yaml import bounded_text, in_one_line
from dpo_cli.durable.refusals import reason
from dpo_cli.errors import ConfigError

PARTS: dict[str, tuple[type, str]] = {  # part -> type, and its name in messages
    "description": (str, "text"),
    "vars": (dict, "names and values, such as {rows: 100}"),
    "steps": (list, "a list of steps"),
    "report": (list, "a list such as [{label: SFT, step: sft}]"),
}
LONGEST_MINUTES = 10**6


def read_body(path: Path) -> dict[str, Any]:
    """The parts of a recipe, `repeat` unchecked. Raises ConfigError that names file and key."""
    try:
        body: Any = OmegaConf.to_container(OmegaConf.create(bounded_text(path)), resolve=False)
    except OSError as error:
        raise ConfigError(f"{path}: {reason(error)}") from error
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {in_one_line(error)}") from error
    except AssertionError:  # by OmegaConf, for a number or a set
        body = None
    expect_keys(body, {"repeat", *PARTS}, f"{path}")
    parts = {"repeat": body.get("repeat")}
    for part, (kind, expected) in PARTS.items():
        value = body.get(part)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{path}: {part}: expected {expected}")
        parts[part] = kind() if value is None else value
    for name in parts["vars"]:
        if not isinstance(name, str):
            raise ConfigError(f"{path}: vars: {name}: a name must be text")
    return parts


def expect_keys(body: Any, known: set[str], where: str) -> None:
    if not isinstance(body, dict):
        raise ConfigError(f"{where}: expected the keys {listed(known)}")
    for key in body:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigError(f"{where}: {key}: unknown key{hint} (known: {listed(known)})")


def listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def minutes_of(body: dict[str, Any], where: str) -> float | None:
    """A step's estimate in minutes, or None. Raises ConfigError."""
    minutes = body.get("minutes")
    if minutes is None:
        return None
    number = isinstance(minutes, (int, float)) and not isinstance(minutes, bool)
    if not (number and math.isfinite(minutes) and 0 < minutes <= LONGEST_MINUTES):
        raise ConfigError(f"{where}: minutes={minutes}: expected a number above 0")
    return float(minutes)


def overrides_of(body: dict[str, Any], where: str) -> dict[str, Any] | list[str]:
    """A step's overrides: a mapping by dotted key, or a list of key=value. Raises ConfigError."""
    overrides = body.get("overrides") or {}
    if isinstance(overrides, dict):
        return _flatten(overrides)
    if not isinstance(overrides, list):
        raise ConfigError(f"{where}: overrides: expected keys and values, or a list of key=value")
    words = [str(word) for word in overrides]
    if wrong := [word for word in words if "=" not in word]:
        raise ConfigError(f"{where}: {wrong[0]}: overrides are written key=value")
    return words


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{train: {epochs: 1}} -> {train.epochs: 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
