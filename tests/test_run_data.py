"""An evaluation reads the rows that the policy's own run held out, unless it is told otherwise."""

from __future__ import annotations

import json

import pytest

from dpo_cli import cli
from dpo_cli.config.hydra import composed
from dpo_cli.config.read import prepare
from dpo_cli.plan.dry_run import plan_rows
from dpo_cli.run import run
from small_runs import TINY, configure

ROWS = [
    {"question": f"the {n}th film", "good": f" was good {n}", "poor": f" was poor {n}"}
    for n in range(24)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Rows with columns of their own; SFT on them, and DPO against it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = (
        "data=jsonl", f"data.path={folder / 'rows.jsonl'}", "data.prompt_field=question",
        "data.chosen_field=good", "data.rejected_field=poor", "data.eval_rows=6",
        "train.max_steps=1", "train.sample_prompts=0", *(w for w in TINY if w[:5] != "data."),
    )  # fmt: skip
    start = f"model.path={folder / 'sft'}"
    for name, words in (("sft", ("stage=sft",)), ("dpo", ("stage=dpo", start))):
        run(configure(*data, *words, f"run_dir={folder / name}"), ["dpo-run"])
    return folder


def evaluation(home, *words, policy="dpo"):
    words = ["stage=evaluate", f"model.path={home / policy}", *words]
    return prepare(composed(words), words)


@pytest.mark.parametrize("policy", ["dpo", "dpo/final"])
def test_what_is_not_typed_comes_from_the_run(home, policy):
    data = evaluation(home, policy=policy).data
    assert (data.name, data.prompt_field, data.eval_rows) == ("jsonl", "question", 6)
    assert data.path == str(home / "rows.jsonl")
    assert data.date is None  # the run finds its own
    data = evaluation(home, "data.eval_rows=3", "data=jsonl", policy=policy).data
    assert (data.prompt_field, data.eval_rows) == ("question", 3)


def test_rows_of_another_file_keep_the_columns_alone(home, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(ROWS[0]) + "\n")
    data = evaluation(home, "data=jsonl", f"data.path={other}").data
    assert (data.path, data.prompt_field, data.eval_rows) == (str(other), "question", None)


def test_another_dataset_takes_nothing(home):
    data = evaluation(home, "data=sentiment").data
    assert (data.name, data.path, data.eval_rows) == ("sentiment", None, 400)


def test_a_model_from_elsewhere_changes_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("[not, a, run]")
    words = ["stage=evaluate", f"model.path={tmp_path}"]
    assert prepare(composed(words), words).data.name == "sentiment"


def test_the_plan_tells_reference_and_data(home):
    rows = dict(plan_rows(evaluation(home)))
    assert rows["reference"] == str(home / "sft")
    assert rows["reward"] == "none"
    told = [line for name, line in plan_rows(evaluation(home)) if "data settings" in line]
    assert told[0].startswith(f"data settings are those of {home / 'dpo'}: data=jsonl")
    (other,) = (x for _, x in plan_rows(evaluation(home, "data.eval_rows=2")) if "differ" in x)
    assert other.endswith("data.eval_rows=2 (there 6)")
    assert "not measured" in dict(plan_rows(evaluation(home, policy="sft")))["reference"]


def test_an_evaluation_of_a_run_needs_no_words_on_data(home, tmp_path, capsys):
    words = (
        "stage=evaluate", f"model.path={home / 'dpo'}", "stage.prompts=4", "hardware=cpu",
        "logger=none", "logger.progress=plain", f"run_dir={tmp_path / 'e'}",
        f"cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    cli.main(list(words))
    err = " ".join(capsys.readouterr().err.split())
    assert f"data settings are those of {home / 'dpo'}" in err
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["pairs"] == 6
    assert {"accuracy", "accuracy_low", "accuracy_high", "kl"} <= summary.keys()
    assert "reward" not in summary
    assert "prompts" not in summary  # they are held out
