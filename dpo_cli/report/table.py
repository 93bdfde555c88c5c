"""One table for consoles, Markdown, HTML (templates/parts.html.j2), CSV and JSON."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import rich.table
from rich.cells import cell_len
from rich.text import Text

from dpo_cli.escapes import printable
from dpo_cli.report.numbers import brief, figures

WIDEST_NAME = 16  # characters of a first column that a narrow console does not wrap
MANY_COLUMNS = 6  # more are set closer, to fit 80 characters

# A cell that starts with one of these is a formula to Excel, LibreOffice or Google Sheets.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001


class Measured(NamedTuple):
    """A figure with its standard error; None: unknown."""

    value: Any
    error: Any = None


@dataclass(frozen=True)
class Column:
    """head: may contain line breaks, which only a console shows.

    numeric: aligned right. metric: the figures are formatted as this metric's, with the same
    decimals in all rows (`numbers.figures`); "": each number to four digits.
    """

    head: str = ""
    numeric: bool = False
    metric: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of texts, numbers, `Measured` and None; the first cell of a row names it.

    caption: one line above the table; note: one below it. `print` of a rich console shows it.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    note: str = ""

    def cells(self) -> list[list[str]]:
        """The formatted rows, control characters escaped."""
        columns = [
            _formatted(column, [row[place] for row in self.rows])
            for place, column in enumerate(self.columns)
        ]
        return [list(row) for row in zip(*columns, strict=True)]

    def __rich__(self) -> rich.table.Table:
        return self.rich()

    def rich(self, prose: bool = False) -> rich.table.Table:
        """For a console, with texts taken literally. prose: equal column widths, space between
        rows."""
        cells = self.cells()
        headed = any(column.head for column in self.columns)
        table = rich.table.Table(
            title=Text(printable(self.title)), title_justify="left", show_header=headed,
            show_lines=prose, collapse_padding=len(self.columns) > MANY_COLUMNS,
        )  # fmt: skip
        for place, column in enumerate(self.columns):
            head = printable(column.head)
            names = [] if place else [cell_len(row[0]) for row in cells]
            width = max([min(WIDEST_NAME, max(names, default=0)), *_widths(head)])
            table.add_column(
                Text(head), justify="right" if column.numeric else "left", overflow="fold",
                style="" if headed or place else "bold",
                ratio=1 if prose else None, min_width=None if prose else width,
            )  # fmt: skip
        for row in cells:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """A Markdown table, with HTML, markup and table borders in cells escaped."""
        rule = "".join("---:|" if column.numeric else "---|" for column in self.columns)
        heads = [column.head for column in self.columns]
        lines = [_line(heads), f"|{rule}\n", *map(_line, self.cells())]
        return "".join(lines)

    def csv(self) -> str:
        """All values in full; empty cells for None, NaN and infinities; formulas are escaped."""
        text = io.StringIO()
        rows = [[column.head for column in self.columns], *self.rows]
        csv.writer(text, lineterminator="\n").writerows([_plain(v) for v in row] for row in rows)
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """The input of `from_json`; cells must be texts, numbers or None."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Table | None:
        """The table of a `to_json`; None for anything else."""
        try:
            columns = [Column(**column) for column in value["columns"]]
            rows = [list(row) for row in value["rows"]]
            texts = [str(value[name]) for name in ("title", "caption", "note")]
        except (KeyError, TypeError):
            return None
        known = columns and all(len(row) == len(columns) for row in rows)
        return cls(texts[0], columns, rows, *texts[1:]) if known else None


def summary_table(title: str, rows: Iterable[tuple[str, object]]) -> Table:
    """Names and values, without heads."""
    return Table(title, (Column(), Column()), list(rows))


def markdown_text(value: Any) -> str:
    """Text as one line of Markdown, with HTML, markup and table borders escaped."""
    text = " ".join(printable(brief(value)).split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(text, quote=False))


def _formatted(column: Column, values: Sequence[Any]) -> list[str]:
    measured = [v if isinstance(v, Measured) else Measured(v) for v in values]
    if column.metric:
        texts = figures(column.metric, [m.value for m in measured], [m.error for m in measured])
    else:
        texts = [brief(m.value) for m in measured]
    return [printable(text) for text in texts]


def _widths(head: str) -> list[int]:
    return [cell_len(line) for line in head.split("\n")]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown_text, cells)) + " |\n"


def _plain(value: Any) -> Any:
    """A cell of a CSV file."""
    if isinstance(value, Measured):
        value = value.value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, (int, float)):
        return value
    text = printable(str(value))  # a bare "\r" would also end the row
    return f"'{text}" if text.startswith(_FORMULA_STARTS) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    """Whether text such as `-1e-5` is a plain number and no formula."""
    try:
        return math.isfinite(float(text)) and text.isascii() and text == text.strip()
    except ValueError:
        return False
