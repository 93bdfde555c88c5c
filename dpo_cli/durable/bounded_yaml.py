"""Read YAML that others may have written: bounded in size, depth and what its aliases expand to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LARGEST_KB = 256
DEEPEST = 32  # lists and mappings within each other
MOST_VALUES = 20_000  # with every alias written out


def bounded_text(path: Path) -> str:
    """The file's text, for a parser that recurses and writes out aliases.

    Raises OSError, and ValueError in one line for a file that is too large, too deep, not UTF-8 or
    not YAML.
    """
    if path.stat().st_size > LARGEST_KB * 2**10:
        raise ValueError(f"larger than {LARGEST_KB} KB, which no file of settings is")
    text = path.read_text(encoding="utf-8")
    try:
        _refuse_bombs(text)
    except yaml.YAMLError as error:
        raise ValueError(in_one_line(error)) from error
    return text


def read_yaml(path: Path) -> Any:
    """The file's plain values. Raises as `bounded_text` does."""
    text = bounded_text(path)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(in_one_line(error)) from error


def in_one_line(error: Exception) -> str:
    """What a parser says, without its name for a text that has none."""
    return " ".join(str(error).replace('in "<unicode string>", ', "in ").split())


def _refuse_bombs(text: str) -> None:
    """By the parser's events: to build nodes recurses, and in C that ends the process."""
    known: dict[str, int] = {}  # anchor -> values below it
    anchors: list[str | None] = [None]  # of the collections that are open
    counts = [0]  # values in each of them
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            anchors.append(event.anchor)
            counts.append(1)
            if len(counts) > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in known:
                raise ValueError(f"the alias *{event.anchor} is undefined, or within itself")
            values = known[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values = anchors.pop(), counts.pop()
            known |= {anchor: values} if anchor else {}
        elif isinstance(event, yaml.ScalarEvent):
            values = 1
            known |= {event.anchor: values} if event.anchor else {}
        else:
            continue
        counts[-1] += values
        if counts[-1] > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, with its aliases written out")
