"""Which rows were left out or cut, and why: nothing leaves the data silently."""

from __future__ import annotations

from dataclasses import dataclass, field

MISSING = "is missing"  # the reason of a row without a column
SHOWN = 5  # row numbers in a message; the report keeps them all


class BadRow(Exception):
    """A row that cannot be used: `field` is the column at fault, `reason` continues it."""

    def __init__(self, reason: str, field: str):
        super().__init__(f"{field} {reason}")
        self.reason = reason
        self.field = field


@dataclass
class DropReport:
    """What became of the rows. Row numbers count from 0 in their file.

    read: rows taken from the source. dropped: reason -> rows (a row that makes several
    examples is listed once for each of them that is dropped). cut: what -> rows that
    were kept, but shortened. noted: what is worth a look -> rows that were kept as they are.
    """

    read: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    noted: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, row: int) -> None:
        self.dropped.setdefault(reason, []).append(row)

    def add_cut(self, what: str, row: int) -> None:
        self.cut.setdefault(what, []).append(row)

    def add_note(self, what: str, row: int) -> None:
        self.noted.setdefault(what, []).append(row)

    def absorb(self, other: DropReport, prefix: str) -> None:
        """Add the report of another file; `prefix` says whose row numbers they are."""
        self.read += other.read
        for reason, rows in other.dropped.items():
            self.dropped.setdefault(prefix + reason, []).extend(rows)
        for what, rows in other.cut.items():
            self.cut.setdefault(prefix + what, []).extend(rows)
        for what, rows in other.noted.items():
            self.noted.setdefault(prefix + what, []).extend(rows)

    def summary_lines(self) -> list[str]:
        """One line a reason, the most frequent first; empty if every row is whole."""
        tables = {"dropped": self.dropped, "cut": self.cut, "note on": self.noted}
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
    """How messages call one of an example's `count` responses."""
    if count == 1:
        return "response"
    return ("chosen", "rejected")[place] if count == 2 else f"response {place}"
