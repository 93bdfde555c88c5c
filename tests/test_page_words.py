"""What report.html says of a run: titles, sentences, tables and figures, worked out by hand."""

from __future__ import annotations

import json

import pytest

from dpo_cli.report.numbers import figure, figures, label
from dpo_cli.report.table import Column, Table
from page_runs import POINTS, dpo_run, evaluation, jsonl, report


def test_a_dpo_run_in_words(tmp_path):
    page = report(dpo_run(tmp_path / "r"), train_rows=2000)
    assert page.texts["h1"] == ["DPO of sft on 03-label/train.jsonl"]
    assert (
        "After 40 steps on 2,000 pairs: the chosen response ranks first in 73.1% of the held-out "
        "pairs (50.0% before); held-out loss 0.612 (0.693 before)."
    ) in page.text
    assert page.texts["dt"][:2] == ["Held-out preference accuracy", "Held-out loss"]
    assert page.texts["dd"][:2] == ["73.1% 50.0% before", "0.612 0.693 before"]


@pytest.mark.parametrize(
    ("stage", "title"),
    [
        ({"name": "dpo", "loss": "sigmoid", "label_smoothing": 0.1}, "cDPO of sft on hh"),
        ({"name": "dpo", "loss": "ipo", "label_smoothing": 0.0}, "IPO of sft on hh"),
        ({"name": "ppo-baseline"}, "PPO of sft on hh"),
        ({"name": "ppo-baseline", "advantage": "rloo"}, "RLOO of sft on hh"),
        ({"name": "sft"}, "Supervised fine-tuning of sft on hh"),
    ],
)
def test_titles(tmp_path, stage, title):
    config = {"stage": stage, "model": {"path": "runs/sft"}, "data": {"name": "hh", "path": "x/y"}}
    assert report(dpo_run(tmp_path / "r", config=config)).texts["h1"] == [title]


def test_an_evaluation_in_words(tmp_path):
    page = report(evaluation(tmp_path / "r", 0.7621))
    assert page.texts["h1"] == ["Evaluation of 04-dpo on sentiment"]
    assert (
        "50 completions: reward 0.762 ± 0.015 at a KL of 1.819 ± 0.078 nats to the reference; "
        "73.1 ± 1.8% of the held-out pairs ranked correctly."
    ) in page.text


def test_several_policies_in_words(tmp_path):
    folder = evaluation(
        tmp_path / "r", 0, summary={"stage": "evaluate"}, points_jsonl=jsonl(POINTS)
    )
    page = report(folder)
    assert page.texts["h1"] == ["Evaluation of 2 policies on sentiment"]
    assert (
        "2 policies: highest reward 0.930 ± 0.010 at a KL of 5.200 ± 0.100 nats, by dpo beta=0.1, "
        "step 40; the optimum at that KL has 0.950."
    ) in page.text
    head, *rows = page.rows("Reward and KL with their standard errors")
    assert head[:4] == ["Method", "Setting", "KL (nats)", "Reward"]
    assert [row[:2] for row in rows] == [
        ["dpo", "beta=1"], ["dpo", "beta=0.1"], ["optimum", "beta=0.01"],
    ]  # fmt: skip
    assert rows[2][4:6] == ["–", "–"]  # noqa: RUF001


FRONTIER = {
    "findings": ["Up to a KL of 2: dpo leads sft, by 0.200 ± 0.014."],
    "tables": [
        Table("Rewards", (Column("method"), Column("KL≤2", numeric=True)),
              [["dpo | x", "0.510±0.010"]], "Highest reward up to a KL.").to_json(),
        Table("Costs", (Column("method"), Column("samples", numeric=True)),
              [["dpo", 8192]], "Distance to the optimum.").to_json(),
        {"title": "of another version"},
    ],
}  # fmt: skip


def test_a_frontier_in_words(tmp_path):
    config = {"stage": {"name": "frontier"}}
    folder = evaluation(
        tmp_path / "r", 0, config=config, summary={}, points_jsonl="",
        frontier_json=json.dumps(FRONTIER),
        frontier_csv="method,setting,kl,reward\ndpo,beta=1,2.5,0.6\n",
    )  # fmt: skip
    page = report(folder)
    assert page.texts["h1"] == ["Frontier of reward and KL"]
    assert page.texts["p"][1] == "Up to a KL of 2: dpo leads sft, by 0.200 ± 0.014."
    assert page.rows("Highest reward up to a KL.") == [
        ["method", "KL≤2"], ["dpo | x", "0.510±0.010"],
    ]  # fmt: skip
    assert page.rows("Distance to the optimum.")[1] == ["dpo", "8,192"]
    assert page.rows("Reward and KL with their standard errors")[1] == [
        "dpo", "beta=1", "2.500", "0.600",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rewards", "errors", "level"),
    [
        ((0.80, 0.79), (0.01, 0.01), True),
        ((0.80, 0.78), (0.01, 0.01), True),  # 0.02 < 2 x 0.0141
        ((0.80, 0.76), (0.01, 0.01), False),
        ((0.80, 0.20), (None, 0.01), True),  # an error that nobody knows
    ],
)
def test_no_policy_wins_within_the_noise(tmp_path, rewards, errors, level):
    rows = [
        {**POINTS[0], "setting": f"beta={n}", "reward": reward, "reward_se": error}
        for n, (reward, error) in enumerate(zip(rewards, errors, strict=True))
    ]
    summary = {"stage": "evaluate"}
    page = report(evaluation(tmp_path / "r", 0, summary=summary, points_jsonl=jsonl(rows)))
    told = "(no more than level with dpo beta=1"
    assert (told in page.text) == level
    assert ("the highest of 2, within the noise" in page.text) == level


def test_ppo_is_told_by_its_held_out_prompts(tmp_path):
    summary = {"stage": "ppo-baseline", "score": 0.3, "kl": 3.5, "rollout/finished": 0.2,
               "eval/score": 0.2, "eval/kl": 3.2, "eval/finished": 0.16}  # fmt: skip
    config = {"stage": {"name": "ppo-baseline"}, "model": {"name": "tiny"}, "data": {"name": "hh"}}
    page = report(dpo_run(tmp_path / "r", summary=summary, config=config))
    assert (
        "held-out score 0.200; held-out KL to the reference 3.200 nats; only 16.0% of the "
        "completions finished with EOS."
    ) in page.text


def test_matches_are_shown_with_their_verdicts(tmp_path):
    rows = [
        {"prompt": f"Q{n}", "policy": f"runs/{name}/final", "opponent": "chosen", "judge": "http",
         "temperature": t, "completion": f"{name} {n}", "other": f"human {n}", "verdict": verdict,
         "reason": "shorter" * (n == 0)}
        for name in ("dpo", "sft") for t in (0.7, 1.0)
        for n, verdict in enumerate(("win", "loss", "error"))
    ]  # fmt: skip
    folder = evaluation(tmp_path / "r", 0.5)
    (folder / "verdicts.jsonl").write_text(jsonl(rows))
    page = report(folder)
    assert "Matches against chosen" in page.texts["h2"]
    told = [" ".join(text.split()) for text in page.texts["article"]]
    assert told == [
        "Q0 dpo, temperature 0.7: wins dpo 0 chosen (judge: shorter) human 0",
        "Q0 sft, temperature 0.7: wins sft 0 chosen (judge: shorter) human 0",
        "Q1 dpo, temperature 0.7: loses dpo 1 chosen human 1",
        "Q1 sft, temperature 0.7: loses sft 1 chosen human 1",
        "Q2 dpo, temperature 0.7: no verdict dpo 2 chosen human 2",
        "Q2 sft, temperature 0.7: no verdict sft 2 chosen human 2",
    ]


def test_win_rates(tmp_path):
    row = {"policy": "runs/dpo/final", "opponent": "chosen", "judge": "reward_fn",
           "temperature": 0.7, "wins": 130, "losses": 100, "ties": 26, "errors": 0, "unasked": 0,
           "win_rate": 0.5586, "low": 0.497, "high": 0.618}  # fmt: skip
    rates = {"win_rate_t0.7": 0.5586, "win_rate_t0.7_low": 0.497, "win_rate_t0.7_high": 0.618}
    folder = evaluation(tmp_path / "r", 0.5, summary={"stage": "evaluate", **rates})
    (folder / "win_rates.json").write_text(json.dumps([row]))
    page = report(folder)
    assert page.texts["dt"][0] == "Win rate at temperature 0.7"
    assert page.texts["dd"][0] == "55.9% 49.7% to 61.8%"
    assert "win rate 55.9% (49.7% to 61.8%) against chosen at temperature 0.7." in page.text
    _, shown = page.rows("Low and high bound the 95 % interval.")
    assert shown == ["dpo", "chosen", "0.7", "55.9%", "49.7%", "61.8%", "130", "100", "26", "0",
                     "0", "reward_fn"]  # fmt: skip


def test_completions_before_during_and_after(tmp_path):
    page = report(dpo_run(tmp_path / "r"))
    answers = [dt for dt in page.texts["dt"] if "step" in dt]
    assert answers == ["Before training: step 0", "During: step 20", "After: step 40"] * 2
    assert page.texts["dd"][-3:] == ["I saw at 0", "I saw at 20", "I saw at 40"]


def test_figures_line_up():
    assert figures("reward", [0.4964, 0.7621, None]) == ["0.496", "0.762", "–"]  # noqa: RUF001
    errors = figures("kl", [0.0, 12.3456], [0.0, 0.5])
    assert errors == [
        "0.00\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.00",
        "12.35\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.50",
    ]
    assert figures("kl", [0.0, 1.29e-6], [0.0, 2e-7]) == [
        "0\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0",
        "1.29e\N{MINUS SIGN}6\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}2.00e\N{MINUS SIGN}7",
    ]
    assert figures("pairs", [594, 12000]) == ["594", "12,000"]
    assert figures("accuracy", [0.5, 1.0]) == ["50.0%", "100.0%"]
    assert figure("lr", 1e-6) == "1.00e−6"  # noqa: RUF001
    assert figure("eval/rewards/margins", -0.25) == "−0.250"  # noqa: RUF001
    assert figure("loss", float("nan")) == "–"  # noqa: RUF001
    assert label("eval/kl") == "Held-out KL to the reference (nats)"
    assert label("unheard/of") == "unheard/of"
