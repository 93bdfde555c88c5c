"""Convert values of YAML and the command line to the schema's dataclasses, with typed fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from dpo_cli.config.hints import TABLES, optional, renamed, unknown_key

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Mismatch(Exception):
    """A value of the wrong type; the message says what was expected."""


def fit(schema: Any, values: Any, path: str, chosen: Mapping[str, str], problems: list[str]) -> Any:
    """An instance of `schema`; keys absent from `values` keep their defaults.

    path: the group's dotted key, "" for the root; chosen: group -> option, which select schemas.
    Unknown keys and values of the wrong type are appended to `problems`, one line each.
    """
    if not isinstance(values, dict):
        problems.append(f"{path}={values}: expected a group of keys")
        return None
    hints = get_type_hints(schema)
    fields = {field.name for field in dataclasses.fields(schema)}
    values = {renamed(schema).get(key, key): value for key, value in values.items()}
    prefix = f"{path}." if path else ""
    problems += [unknown_key(f"{prefix}{key}", chosen) for key in values if key not in fields]
    arguments: dict[str, Any] = {}
    for name in (key for key in values if key in fields):
        kind, nullable = optional(hints[name])
        value = values[name]
        full = f"{prefix}{name}"
        if value is None and nullable:
            arguments[name] = None
        elif get_origin(kind) is dict:
            if not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
                problems.append(f"{full}={value}: expected names and values such as {{name: 1}}")
            arguments[name] = value
        elif dataclasses.is_dataclass(kind):
            kind = TABLES[name][chosen[name]] if name in TABLES and not path else kind
            arguments[name] = fit(kind, value, full, chosen, problems)
        else:
            try:
                arguments[name] = _convert(value, kind)
            except Mismatch as mismatch:
                null = " or null" if nullable else ""
                problems.append(f"{full}={value}: expected {mismatch}{null}{_many(full, value)}")
    missing = _required(schema) - arguments.keys()
    if missing:
        problems += [f"{prefix}{name}: missing" for name in sorted(missing - values.keys())]
        return None
    return schema(**arguments)


def _many(key: str, value: Any) -> str:
    """A hint for `hardware.device=2`, which means two devices."""
    counted = key == "hardware.device" and type(value) is int
    return f"; did you mean hardware.devices={value}?" if counted else ""


def _required(schema: Any) -> set[str]:
    empty = dataclasses.MISSING
    fields = dataclasses.fields(schema)
    return {f.name for f in fields if f.default is empty and f.default_factory is empty}


def _list(value: Any, item: Any) -> list[Any]:
    """A list; one string stands for a list of one."""
    if item is str and isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise Mismatch(f"a list such as [{NAMES[item]}, ...]")
    return [_convert(entry, item) for entry in value]


def _convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`; numbers may be strings, from the environment or as 1e-5 in YAML."""
    if get_origin(kind) is list:
        return _list(value, *get_args(kind))
    if get_origin(kind) is UnionType:
        if type(value) in get_args(kind):
            return value
        raise Mismatch(" or ".join(NAMES[part] for part in get_args(kind)))
    if kind is str and not isinstance(value, str):
        raise Mismatch("text; put it in quotes")  # YAML reads a bare off as false, 7e1 as 70.0
    if isinstance(value, str) and "\0" in value:  # not allowed in file names and arguments
        raise Mismatch("text without NUL characters")
    if type(value) is kind:
        return value
    if kind in (int, float) and isinstance(value, (int, float, str)) and value is not True:
        number = _number(value)
        if number is not None and (kind is float or number.is_integer()):
            return kind(number)
    raise Mismatch(NAMES[kind])


def _number(value: float | str) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):  # more digits than a float has
        return None
