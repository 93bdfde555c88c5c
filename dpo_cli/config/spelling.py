"""What a mistyped word most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean x?`, or nothing where no choice is close: those that begin so, else the
    nearest."""
    known = list(choices)
    begun = [choice for choice in known if len(word) > 2 and choice.startswith(word)]
    close = begun or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
