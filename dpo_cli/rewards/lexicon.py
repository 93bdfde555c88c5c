"""Mean valence of a completion's words, from a lexicon."""

from __future__ import annotations

import math
import string
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_cli.errors import ConfigError, DataError
from dpo_cli.rewards.scorers import Completed, Scorer, finite

PUNCTUATION = string.punctuation + "“”‘’«»…–—"  # noqa: RUF001 - as in typeset texts
MAX_BYTES = 2**26  # of a word list


def lexicon(valences: Mapping[str, float]) -> Scorer:
    """The scorer of a table of case-folded words: mean valence, 0 for a text without words.

    A word is looked up verbatim (for emoticons), then without the punctuation around it. Words not
    in the table have valence 0; punctuation alone is not a word.
    """

    def score(rows: Sequence[Completed]) -> list[float]:
        return finite([mean_valence(row.completion, valences) for row in rows])

    return score


def mean_valence(text: str, valences: Mapping[str, float]) -> float:
    values = []
    for word in text.casefold().split():
        bare = word.strip(PUNCTUATION)
        if word in valences:
            values.append(valences[word])
        elif bare:
            values.append(valences.get(bare, 0.0))
    return sum(values) / len(values) if values else 0.0


def from_lists(positive: Sequence[str], negative: Sequence[str]) -> dict[str, float]:
    """Valences 1 and -1. Raises ConfigError for empty lists, or a word in both."""
    good, bad = ({word.casefold() for word in words} for words in (positive, negative))
    if not good | bad:
        raise ConfigError(
            "reward_fn=lexicon: no words; set reward_fn.path=<file> or reward_fn.positive=[...]"
        )
    if both := sorted(good & bad):
        raise ConfigError(f"reward_fn.negative: {both[0]!r} is also in reward_fn.positive")
    return dict.fromkeys(good, 1.0) | dict.fromkeys(bad, -1.0)


def read_lexicon(path: Path) -> dict[str, float]:
    """Case-folded words of lines `word<TAB>valence[<TAB>...]`, as in VADER's file.

    Of words that differ only in case the one in lower case counts, otherwise the first. A `.zip`
    must contain one `.txt` file. Raises DataError.
    """
    try:
        lines = _content(path).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile, RuntimeError) as error:
        raise DataError(f"reward_fn.path={path}: cannot be read: {error}") from error
    valences: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            word, valence = _entry(line, f"{path}:{number}")
            if word.islower() or word.casefold() not in valences:
                valences[word.casefold()] = valence
    if not valences:
        raise DataError(f"reward_fn.path={path}: contains no words")
    return valences


def _content(path: Path) -> bytes:
    if path.suffix != ".zip":
        _bounded(path, path.stat().st_size)
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt")]
        if len(names) != 1:
            raise DataError(
                f"reward_fn.path={path}: contains {len(names)} .txt files instead of one"
            )
        _bounded(path, archive.getinfo(names[0]).file_size)  # reading stops there
        return archive.read(names[0])


def _bounded(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise DataError(f"reward_fn.path={path}: more than {MAX_BYTES / 2**20:.0f} MB of words")


def _entry(line: str, where: str) -> tuple[str, float]:
    word, *numbers = line.rstrip("\r").split("\t")
    try:
        valence = float(numbers[0])
    except (IndexError, ValueError):
        valence = math.nan
    if not (word.strip() and math.isfinite(valence)):
        raise DataError(f"{where}: not a line `word<TAB>valence`: {line[:60]!r}")
    return word.strip(), valence
