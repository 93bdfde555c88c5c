"""Text from outside made printable: it must not control a terminal, a page or a file name."""

from __future__ import annotations

import functools
import logging
import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any

# Terminal controls, lone surrogates, line separators, the marks that reverse text's direction.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]"
)  # fmt: skip
LONGEST_LINE = 2000  # characters of a message's line; its start and its end are shown


def printable(text: str) -> str:
    """`text` with control characters escaped; line breaks and tabs stay."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def in_one_line(text: str) -> str:
    """`printable`, with line breaks and tabs escaped, and cut in the middle where it is long."""
    line = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def visible(text: str) -> str:
    """All but plain characters and spaces escaped, such as a no-break space: for tokens."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str, error: bool = False) -> None:
    """Print lines that hold text from outside; error: to stderr."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


class PrintableRecord(logging.LogRecord):
    """A log record, of any library, whose message cannot control a terminal."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


@functools.cache
def escape_messages() -> None:
    """From now on, what loggers and warnings print in this process is printable."""
    logging.setLogRecordFactory(PrintableRecord)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(plain(*args, **kwargs))


def printable_values(value: Any) -> Any:
    """`value` with every text in its mappings and lists printable, names of keys too."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable_values(key): printable_values(item) for key, item in value.items()}
    return [printable_values(item) for item in value] if isinstance(value, (list, tuple)) else value
