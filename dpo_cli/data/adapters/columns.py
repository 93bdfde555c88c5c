"""Typed reading of a raw row's columns; what has another type raises `BadRow`."""

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
    """A finite float; a bool is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"is {kind(value)}, not a number", field)
    # Python's integers have no upper limit, floats have
    if abs(value) > 1e300 or math.isnan(value):
        raise BadRow("is not a finite number", field)
    return float(value)


def as_bool(value: Any, field: str) -> bool:
    """True or False; 0, 1 and texts are neither."""
    if not isinstance(value, bool):
        raise BadRow(f"holds {kind(value)} where true or false should be", field)
    return value


def kind(value: Any) -> str:
    """How a message names a value: `None`, `an empty list`, `int`."""
    if value is None:
        return "None"
    return "an empty list" if value == [] else type(value).__name__
