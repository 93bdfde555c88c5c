"""Suggestions for mistyped words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean x?`, of the choices with this prefix or the closest one; "" if none."""
    known = list(choices)
    prefixed = [choice for choice in known if len(word) > 2 and choice.startswith(word)]
    close = prefixed or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
