"""Mean valence of a completion's words, from a lexicon."""

from __future__ import annotations

import math
import string
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_cli.errors import ConfigError, DataError
from dpo_cli.rewards.scorers import Completed, Scorer

PUNCTUATION = string.punctuation + "“”‘’«»…–—"  # noqa: RUF001 - as texts have them


def lexicon(valences: Mapping[str, float]) -> Scorer:
    """The scorer of a table of case-folded words: mean valence, 0 where there is no word.

    A word is looked up as it stands (emoticons), then without the punctuation around it. One
    that is not in the table has valence 0; punctuation alone is no word.
    """

    def score(rows: Sequence[Completed]) -> list[float]:
        return [mean_valence(row.completion, valences) for row in rows]

    return score


def mean_valence(text: str, valences: Mapping[str, float]) -> float:
    found = []
    for word in text.casefold().split():
        bare = word.strip(PUNCTUATION)
        if word in valences:
            found.append(valences[word])
        elif bare:
            found.append(valences.get(bare, 0.0))
    return sum(found) / len(found) if found else 0.0


def from_lists(positive: Sequence[str], negative: Sequence[str]) -> dict[str, float]:
    """Valence 1 and -1. Raises ConfigError for no word at all, or one on both sides."""
    good, bad = ({word.casefold() for word in words} for words in (positive, negative))
    if not good | bad:
        raise ConfigError(
            "reward_fn=lexicon: no words; set reward_fn.path=<file> or reward_fn.positive=[...]"
        )
    if both := sorted(good & bad):
        raise ConfigError(f"reward_fn.negative: {both[0]!r} is in reward_fn.positive, too")
    return dict.fromkeys(good, 1.0) | dict.fromkeys(bad, -1.0)


def read_lexicon(path: Path) -> dict[str, float]:
    """Words, case-folded, of lines `word<TAB>valence[<TAB>...]`; VADER's file is one such.

    Of words that differ in case alone the one in lower case counts, else the first. A `.zip`
    has one `.txt` file. Raises DataError.
    """
    try:
        lines = _content(path).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise DataError(f"reward_fn.path={path}: cannot be read: {error}") from error
    found: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            word, valence = _entry(line, f"{path}:{number}")
            if word.islower() or word.casefold() not in found:
                found[word.casefold()] = valence
    if not found:
        raise DataError(f"reward_fn.path={path}: has no words")
    return found


def _content(path: Path) -> bytes:
    if path.suffix != ".zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt")]
        if len(names) != 1:
            raise DataError(f"reward_fn.path={path}: {len(names)} .txt files in it, give one")
        return archive.read(names[0])


def _entry(line: str, where: str) -> tuple[str, float]:
    word, *numbers = line.rstrip("\r").split("\t")
    try:
        valence = float(numbers[0])
    except (IndexError, ValueError):
        valence = math.nan
    if not (word.strip() and math.isfinite(valence)):
        raise DataError(f"{where}: not a line `word<TAB>valence`: {line[:60]!r}")
    return word.strip(), valence
