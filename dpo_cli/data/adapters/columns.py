"""Typed access to a raw row's columns; a wrong type raises `BadRow`."""

from __future__ import annotations

import math
from typing import Any

from dpo_cli.data.drops import MISSING, BadRow


def column(row: dict[str, Any], field: str) -> Any:
    if field not in row:
        raise BadRow(MISSING, field)
    return row[field]


def text(row: dict[str, Any], field: str) -> str:
    return as_text(column(row, field), field)


def as_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"is {kind(value)}, not text", field)
    return value


def number(row: dict[str, Any], field: str) -> float:
    return as_number(column(row, field), field)


def as_number(value: Any, field: str) -> float:
    """A finite float; bools are rejected."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"is {kind(value)}, not a number", field)
    # Python's integers are unbounded, floats are not.
    if abs(value) > 1e300 or math.isnan(value):
        raise BadRow("is not a finite number", field)
    return float(value)


def as_bool(value: Any, field: str) -> bool:
    """True or False; 0, 1 and strings are rejected."""
    if not isinstance(value, bool):
        raise BadRow(f"has {kind(value)} instead of true or false", field)
    return value


def kind(value: Any) -> str:
    """What messages call a value: `None`, `an empty list`, `int`."""
    if value is None:
        return "None"
    return "an empty list" if value == [] else type(value).__name__
