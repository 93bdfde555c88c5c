"""One table as console text, Markdown, CSV and JSON; each worked out by hand."""

import io
import json

import pytest
from rich.console import Console

from dpo_cli.report.table import Column, Measured, Table

TABLE = Table(
    "Runs",
    (Column("name"), Column("mean\nreward", numeric=True, metric="reward"), Column("n", True)),
    [["a|b", Measured(0.5, 0.01), 12000], ["<i>c</i>", Measured(12.0), None]],
    caption="Rewards.",
)
SPACE = "\N{NO-BREAK SPACE}"


def test_cells_of_a_metric_have_the_same_decimals():
    assert TABLE.cells() == [
        ["a|b", f"0.50{SPACE}±{SPACE}0.01", "12,000"],
        ["<i>c</i>", "12.00", "-"],
    ]


def test_markdown_keeps_its_rows_whatever_the_names():
    assert TABLE.markdown().replace(SPACE, " ") == (
        "| name | mean reward | n |\n"
        "|---|---:|---:|\n"
        "| a\\|b | 0.50 ± 0.01 | 12,000 |\n"
        "| &lt;i&gt;c&lt;/i&gt; | 12.00 | - |\n"
    )


def test_csv_has_the_full_values():
    rows = [["=1", 0.123456789, None], ["b", float("nan"), -2]]
    table = Table("", (Column("name"), Column("x"), Column("y")), rows)
    assert table.csv() == "name,x,y\n'=1,0.123456789,\nb,,-2\n"


def test_json_gives_the_same_table_back():
    table = Table(TABLE.title, TABLE.columns, [["a|b", "0.5", 12000]], TABLE.caption, "A note.")
    stored = Table.from_json(json.loads(json.dumps(table.to_json())))
    assert stored is not None
    assert stored.to_json() == json.loads(json.dumps(table.to_json()))
    assert stored.markdown() == table.markdown()


@pytest.mark.parametrize(
    "value",
    [None, [], {"columns": []}, {**TABLE.to_json(), "rows": [["one cell"]]},
     {**TABLE.to_json(), "columns": [{"unknown": 1}]}, {**TABLE.to_json(), "rows": 3}],
)  # fmt: skip
def test_what_is_no_table_is_none(value):
    assert Table.from_json(value) is None


def test_a_console_breaks_heads_where_they_say_so():
    console = Console(file=io.StringIO(), width=60)
    console.print(TABLE)
    shown = [line.replace(SPACE, " ") for line in console.file.getvalue().splitlines()]
    assert shown[0].strip() == "Runs"
    assert any(line.split("┃")[2].strip() == "mean" for line in shown if line.startswith("┃"))
    assert any("0.50 ± 0.01" in line and "a|b" in line for line in shown)
