"""Read untrusted YAML, with limits on its size, depth and values (aliases expanded)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LARGEST_KB = 256
DEEPEST = 32  # nested lists and mappings
MOST_VALUES = 20_000  # with all aliases expanded


def bounded_text(path: Path) -> str:
    """The file's text, checked for a parser that recurses and expands aliases.

    Raises OSError, and ValueError with a one-line message for a file that is too large, nested too
    deeply, not UTF-8 or not YAML.
    """
    if path.stat().st_size > LARGEST_KB * 2**10:
        raise ValueError(f"larger than {LARGEST_KB} KB, the limit for configuration files")
    text = path.read_text(encoding="utf-8")
    try:
        _refuse_bombs(text)
    except yaml.YAMLError as error:
        raise ValueError(in_one_line(error)) from error
    return text


def read_yaml(path: Path) -> Any:
    """The file's plain values. Raises OSError and ValueError, as `bounded_text`."""
    text = bounded_text(path)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(in_one_line(error)) from error


def in_one_line(error: Exception) -> str:
    """A parser's message in one line, without its placeholder for the file name."""
    return " ".join(str(error).replace('in "<unicode string>", ', "in ").split())


def _refuse_bombs(text: str) -> None:
    """ValueError for too many values or levels, by the parser's events: building nodes recurses,
    which in C can crash the process."""
    known: dict[str, int] = {}  # anchor -> values below it
    anchors: list[str | None] = [None]  # of the open collections
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
                raise ValueError(f"the alias *{event.anchor} is undefined or recursive")
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
            raise ValueError(f"more than {MOST_VALUES:,} values, with its aliases expanded")
