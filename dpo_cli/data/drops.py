"""Which rows were dropped or truncated, and why: no row is lost silently."""

from __future__ import annotations

from dataclasses import dataclass, field

MISSING = "is missing"  # the reason of a row without a column
SHOWN = 5  # row numbers in a message; the report keeps them all


class BadRow(Exception):
    """A row that cannot be used. The message is `<field> <reason>`; field: the bad column."""

    def __init__(self, reason: str, field: str):
        super().__init__(f"{field} {reason}")
        self.reason = reason
        self.field = field


@dataclass
class DropReport:
    """What happened to the rows. Row numbers count from 0 in their file.

    read: number of rows read. dropped: reason -> rows (a row with several examples is listed once
    per dropped example). truncated: what -> rows. noted: note -> rows that are used unchanged.
    reading: lines that say how rows are read, and what is taken of each source of a mix.
    """

    read: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    truncated: dict[str, list[int]] = field(default_factory=dict)
    noted: dict[str, list[int]] = field(default_factory=dict)
    reading: list[str] = field(default_factory=list)

    def add(self, reason: str, row: int) -> None:
        self.dropped.setdefault(reason, []).append(row)

    def add_truncated(self, what: str, row: int) -> None:
        self.truncated.setdefault(what, []).append(row)

    def add_note(self, what: str, row: int) -> None:
        self.noted.setdefault(what, []).append(row)

    def absorb(self, other: DropReport, prefix: str) -> None:
        """Add the report of another file, with `prefix` before its reasons."""
        self.read += other.read
        self.reading += [prefix + line for line in other.reading]
        for name in ("dropped", "truncated", "noted"):
            for reason, rows in getattr(other, name).items():
                getattr(self, name).setdefault(prefix + reason, []).extend(rows)

    def summary_lines(self) -> list[str]:
        """One line per reason and note, most frequent first; empty if there are none."""
        tables = {"dropped": self.dropped, "truncated": self.truncated, "note on": self.noted}
        return [
            f"{label} {len(rows):,} of {self.read:,} rows: {reason} ({row_list(rows)})"
            for label, table in tables.items()
            for reason, rows in sorted(table.items(), key=lambda item: -len(item[1]))
        ]


def row_list(rows: list[int]) -> str:
    """`row 3`, `rows 3, 8` or `rows 3, 8, 9, 11, 20 and 12 more`."""
    shown = ", ".join(map(str, rows[:SHOWN]))
    more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def response_name(place: int, count: int) -> str:
    """What messages call one of an example's `count` responses."""
    if count == 1:
        return "response"
    return ("chosen", "rejected")[place] if count == 2 else f"response {place}"
