"""The sweep table: which columns, what they say, and a CSV that is safe to open."""

import csv
import io
import re

import pytest
from rich.console import Console

from dpo_cli.report import compare
from dpo_cli.report.compare import KEY_METRICS


def render(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def sweep_table(jobs, metrics=None):
    """The table of a console, and the CSV."""
    shown, everything = compare.sweep_table(jobs, metrics)
    return shown, everything.csv()


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


JOBS = [
    {
        "job": 0,
        "overrides": {"stage.beta": "0.1", "optim.lr": "1e-6", "seed": 1},
        "exit_code": 0,
        "summary": {"eval/loss": 0.61234, "kl": 3.5, "zeta": 1, "loss": float("nan")},
        "run_dir": "/runs/a, b/0",
    },
    {
        "job": 1,
        "overrides": {"stage.beta": "0.5", "optim.lr": "1e-6"},
        "exit_code": 3,
        "run_dir": '/runs/"1"',
    },
    {"job": 2, "overrides": {"stage.beta": "0.5", "optim.lr": "1e-6"}, "status": "running"},
]


def test_columns_are_what_differs_and_the_metrics_in_order():
    table, text = sweep_table(JOBS)
    shown = [column.head for column in table.columns]
    assert shown == ["job", "beta", "seed", "status", "kl", "eval/\nloss", "loss"]
    header = ["job", "stage.beta", "seed", "status", "kl", "eval/loss", "loss", "zeta", "run_dir"]
    assert text.split("\n")[0].split(",") == header


def test_heads_are_never_broken_inside_a_word():
    overrides = {"stage.beta": "0.1", "optim.lr": "1e-6"}
    summary = dict.fromkeys(KEY_METRICS, -1234.5)
    jobs = [
        {"job": i, "overrides": dict.fromkeys(overrides, i), "summary": summary, "exit_code": 3}
        for i in range(12)
    ]
    table, _ = sweep_table(jobs)
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    words = set(re.findall(r"[^\s│┃]+", console.file.getvalue()))
    assert {
        "job",
        "beta",
        "lr",
        "status",
        "reward",
        "kl",
        "eval/",
        "rewards/",
        "accuracies",
    } < words


def test_keys_that_end_alike_are_shown_whole():
    jobs = [{"job": i, "overrides": {"model.name": i, "data.name": i, "seed": i}} for i in (0, 1)]
    table, _ = sweep_table(jobs)
    shown = [column.head for column in table.columns]
    assert shown == ["job", "model.name", "data.name", "seed", "status"]


def test_values_of_table_and_csv():
    table, text = sweep_table(JOBS)
    shown = render(table)
    assert "0.6123" in shown
    assert "data error (exit 3)" in shown
    rows = read(text)
    assert [row["status"] for row in rows] == ["done", "data error (exit 3)", "running"]
    assert [row["run_dir"] for row in rows] == ["/runs/a, b/0", '/runs/"1"', ""]
    assert (rows[0]["eval/loss"], rows[0]["loss"], rows[1]["kl"]) == ("0.61234", "", "")
    assert (rows[0]["seed"], rows[1]["seed"]) == ("1", "")


def test_the_table_shows_few_metrics_and_the_csv_all():
    summary = dict.fromkeys([*KEY_METRICS, "a"], 1.0)
    table, text = sweep_table([{"job": 0, "summary": summary}])
    heads = [name.replace("/", "/\n") for name in KEY_METRICS]
    assert [c.head for c in table.columns] == ["job", "status", *heads[:5]]
    assert set(summary) < set(read(text)[0])
    table, _ = sweep_table([{"job": 0, "summary": summary}], metrics=["a"])
    assert [c.head for c in table.columns] == ["job", "status", "a"]


def test_one_job_shows_all_its_overrides_and_none_shows_nothing():
    table, _ = sweep_table([JOBS[0]])
    assert [c.head for c in table.columns][1:4] == ["beta", "lr", "seed"]
    table, text = sweep_table([])
    assert (len(table.rows), text) == (0, "job,status,run_dir\n")


@pytest.mark.parametrize("code", [(0, "done"), (-9, "killed (signal 9)"), (1, "failed (exit 1)")])
def test_status_of_an_exit_code(code):
    _, text = sweep_table([{"job": 0, "exit_code": code[0]}])
    assert read(text)[0]["status"] == code[1]


FULL_WIDTH_EQUALS = "\uff1d"


@pytest.mark.parametrize(
    "evil",
    ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\n=1", f"{FULL_WIDTH_EQUALS}1+1"],
)
def test_a_formula_is_only_text_in_the_csv(evil):
    jobs = [{"job": 0, "overrides": {evil: evil}}, {"job": 1, "run_dir": evil, "status": evil}]
    _, text = sweep_table(jobs)
    cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
    assert cells.count(f"'{evil}") == 4
    assert not [cell for cell in cells if cell.startswith(evil[0])]


def test_a_carriage_return_ends_no_row():
    _, text = sweep_table([{"job": 0, "status": "a\r=1,b"}])
    assert [row["status"] for row in read(text)] == [r"a\r=1,b"]


@pytest.mark.parametrize("number", ["-1e-5", "+3", "-0.5", -2, -1.5])
def test_a_negative_number_stays_a_number(number):
    _, text = sweep_table([{"job": 0, "overrides": {"x": number}, "summary": {"kl": -1.5}}])
    assert (read(text)[0]["x"], read(text)[0]["kl"]) == (str(number), "-1.5")


def test_markup_is_literal_and_secrets_stay_out(monkeypatch):
    monkeypatch.setenv("X_TOKEN", "correct-horse")
    job = {"job": 0, "overrides": {"[red]k[/red]": "[/] correct-horse"}, "summary": {"[b]m": 1.0}}
    table, text = sweep_table([job])
    for shown in (render(table), text):
        assert "[red]k[/red]" in shown
        assert "[/] [redacted]" in shown
        assert "[b]m" in shown
        assert "correct-horse" not in shown
