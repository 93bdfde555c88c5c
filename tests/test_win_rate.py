"""Win rates of stage=evaluate, where each completion can be enumerated and judged."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import toy_space
from composing import composed, problems
from dpo_cli.config.read import prepare
from dpo_cli.errors import ConfigError, DataError, NonFiniteError
from dpo_cli.evaluation import measure
from dpo_cli.report import win_rates as picture
from dpo_cli.report.console import Progress
from dpo_cli.run import run
from dpo_cli.statistics import win_rate
from judge_server import KEY, part, serving
from small_runs import configure
from toy_space import NEW_TOKENS, mean_valence

PROMPTS = [" ".join(letters) for letters in itertools.product("abcde", repeat=3)]
ANSWERS = [("a", "b", "c", "a b b", "a c")[i % 5] for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Rows, a reference, and two policies trained against it."""
    home = tmp_path_factory.mktemp("toy")
    rows = [
        {"prompt": p, "chosen": f" {a}", "rejected": " d"}
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {"ref": toy_space.model(0), "one": toy_space.model(0, 0.2), "two": toy_space.model(3)}
    for name, built in models.items():
        toy_space.save(home / name, built, stage="dpo", reference=str(home / "ref"))
    return SimpleNamespace(home=home, models=models)


def evaluate(toy, run_dir, *overrides):
    """(figures, rows of win_rates.json, rows of verdicts.jsonl)."""
    rows = toy.home / "rows.jsonl"
    config = configure(
        "stage=evaluate", "model=custom", "data=jsonl", f"data.path={rows}", "hardware=cpu",
        f"data.eval_path={rows}", "reward_fn=lexicon", "reward_fn.positive=[a]",
        "reward_fn.negative=[b]", f"stage.max_new_tokens={NEW_TOKENS}", "logger.progress=off",
        "logger.plots=false", f"cache_dir={run_dir}-cache", f"run_dir={run_dir}", *overrides,
    )  # fmt: skip
    figures = run(config, ["dpo-run", *overrides])
    lines = (run_dir / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()
    rates = json.loads((run_dir / "win_rates.json").read_text())
    return figures, rates, [json.loads(line) for line in lines]


def spaces(built, temperature):
    """All completions of each prompt, as drawn at that temperature."""

    def cooled(input_ids):
        return SimpleNamespace(logits=built(input_ids=input_ids).logits / temperature)

    ids = toy_space.tokenizer()(PROMPTS)["input_ids"]
    return [toy_space.enumerate_space(cooled, prompt, mean_valence) for prompt in ids]


def expected(ours, theirs):
    """Mean over prompts of P(win) + P(tie) / 2, and the standard error of a sampled pair each."""
    values, variances = [], []
    for a, b in zip(ours, theirs, strict=True):
        score = (np.sign(a.rewards[:, None] - b.rewards[None, :]) + 1) / 2
        weight = a.p[:, None] * b.p[None, :]
        mean = (weight * score).sum()
        values.append(mean)
        variances.append((weight * (score - mean) ** 2).sum())
    return float(np.mean(values)), math.sqrt(sum(variances)) / len(values)


def valence(text):
    return mean_valence(["abcde".index(word) for word in text.split()])


def by_valence(row):
    gap = valence(row["completion"]) - valence(row["other"])
    return "tie" if gap == 0 else "win" if gap > 0 else "loss"


def test_against_the_reference_as_enumerated(toy, tmp_path):
    """The policy at two temperatures, the reference at 1 for both."""
    figures, rates, verdicts = evaluate(
        toy, tmp_path / "e", f"model.path={toy.home / 'two'}", "stage.opponent=reference",
        "stage.win_temperatures=[1.0,0.4]",
    )  # fmt: skip
    reference = spaces(toy.models["ref"], 1.0)
    found = []
    for rate, temperature in zip(rates, (1.0, 0.4), strict=True):
        exact, error = expected(spaces(toy.models["two"], temperature), reference)
        found.append(exact)
        assert abs(rate["win_rate"] - exact) < 4 * error
        assert figures[f"win_rate_t{temperature:g}"] == rate["win_rate"]
        assert figures[f"win_rate_t{temperature:g}_low"] == rate["low"] < rate["win_rate"]
    assert abs(found[0] - found[1]) > 0.05  # the temperatures can be told apart
    others = [[v["other"] for v in verdicts if v["temperature"] == t] for t in (1.0, 0.4)]
    assert others[0] == others[1]


def test_against_the_dataset(toy, tmp_path):
    figures, (rate,), verdicts = evaluate(
        toy, tmp_path / "e", f"model.path={toy.home / 'one'}", "stage.opponent=chosen"
    )
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    for name, value in (("", "win_rate"), ("_low", "low"), ("_high", "high")):
        assert summary[f"win_rate_t1{name}"] == figures[f"win_rate_t1{name}"] == rate[value]
    assert [(v["prompt"], v["other"]) for v in verdicts] == [
        (p, f" {a}") for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    assert [v["verdict"] for v in verdicts] == [by_valence(v) for v in verdicts]
    kinds = [v["verdict"] for v in verdicts]
    wins, losses, ties = (kinds.count(kind) for kind in ("win", "loss", "tie"))
    assert min(wins, losses, ties) > 5
    assert rate == {
        "policy": str(toy.home / "one"), "opponent": "chosen", "judge": "reward_fn=lexicon",
        "temperature": 1.0, "wins": wins, "losses": losses, "ties": ties, "errors": 0,
        "unasked": 0, "win_rate": (wins + ties / 2) / 125,
        "low": pytest.approx(win_rate(wins, losses, ties).low),
        "high": pytest.approx(win_rate(wins, losses, ties).high),
    }  # fmt: skip


def test_several_policies_meet_the_same_opponent(toy, tmp_path, monkeypatch):
    """A policy against itself: the same greedy texts, but samples of their own."""
    home = toy.home
    words = (
        f"stage.policies=[{home / 'one'},{home / 'two'}]", f"stage.opponent={home / 'one'}",
        "stage.win_temperatures=[0,1]",
    )  # fmt: skip
    told = []
    monkeypatch.setattr(Progress, "note", lambda self, line: told.append(line))
    figures, rates, verdicts = evaluate(toy, tmp_path / "e", *words)
    (line,) = [line for line in told if line.startswith("2/2  ")]
    assert f"win_rate_t0 {rates[2]['win_rate']:.1%}  win_rate_t1 {rates[3]['win_rate']:.1%}" in line
    assert "_low" not in line
    best = next(r for r in rates if (r["policy"], r["temperature"]) == (figures["best_policy"], 1))
    assert figures["best_win_rate_t1"] == best["win_rate"]
    assert f"dpo-run stage=frontier 'stage.evaluations=[{tmp_path / 'e'}]'" in "\n".join(told)
    assert [(r["policy"], r["temperature"]) for r in rates] == [
        (str(home / name), t) for name in ("one", "two") for t in (0.0, 1.0)
    ]
    assert (rates[0]["ties"], rates[0]["win_rate"]) == (125, 0.5)
    parts = [verdicts[i : i + 125] for i in range(0, 500, 125)]
    assert any(v["completion"] != v["other"] for v in parts[1])
    exact, error = expected(spaces(toy.models["one"], 1.0), spaces(toy.models["one"], 1.0))
    assert exact == pytest.approx(0.5)
    assert abs(rates[1]["win_rate"] - 0.5) < 4 * error
    for at, same in ((0, 2), (1, 3)):
        assert [v["other"] for v in parts[at]] == [v["other"] for v in parts[same]]
    assert figures["policies"] == 2
    again = evaluate(toy, tmp_path / "again", *words)
    assert again[1:] == (rates, verdicts)


def by_words(request):
    counts = {letter: valence(part(request.text, letter)) for letter in "AB"}
    if "Query: e e" in request.text:
        return request.say(f"{KEY}: I would rather not say.")
    request.say(f"Comparison: by words.\nMore helpful: {max(counts, key=lambda x: counts[x])}")


def test_by_a_language_model(toy, tmp_path, monkeypatch):
    """It agrees with the reward but for ties, is asked both ways, and costs nothing twice."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    words = (
        f"model.path={toy.home / 'one'}", "stage.opponent=chosen", "judge=http", "judge.model=m",
        "judge.retries=0", "judge.max_calls=200",
    )  # fmt: skip
    with serving(by_words) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base)
        figures, (rate,), verdicts = evaluate(toy, tmp_path / "e", *words)
        calls = server.calls
        assert 190 <= calls <= 200
        _, (more,), _ = evaluate(toy, tmp_path / "f", *words, f"cache_dir={tmp_path / 'e'}-cache")
        assert 0 < server.calls - calls < 100  # goes on with what was left
    assert (more["unasked"], more["errors"]) == (0, 5)
    judged = [v for v in verdicts if v["verdict"] in ("win", "loss", "tie")]
    assert [v["verdict"] for v in judged] == [by_valence(v) for v in judged]
    unasked = [i for i, v in enumerate(verdicts) if v["verdict"] == "unasked"]
    assert min(unasked) > 90
    assert {v["reason"] for v in verdicts if v["verdict"] == "unasked"} == {
        "judge.max_calls=200 reached"
    }
    assert (rate["judge"], rate["unasked"]) == ("http=m", len(unasked))
    assert sum(rate[k] for k in ("wins", "losses", "ties", "errors", "unasked")) == 125
    assert figures["win_rate_t1"] == (rate["wins"] + rate["ties"] / 2) / len(judged)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 80
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_the_reference_must_be_known(toy, tmp_path):
    (toy.home / "ref" / "dpo_run.json").unlink()
    with pytest.raises(ConfigError, match=r"^stage\.opponent=reference: set stage\.ref"):
        evaluate(toy, tmp_path / "e", f"model.path={toy.home / 'ref'}", "stage.opponent=reference")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["stage.win_temperatures=[0.7]"],
         "stage.win_temperatures=[0.7]: has no effect with stage.opponent=null; remove it"),
        (["judge=http"],
         "judge=http: has no effect with stage.opponent=null; remove it, or set "
         "stage.opponent=chosen (the dataset's first responses)"),
        (["stage.opponent=chosn"],
         "stage.opponent=chosn: must be chosen, reference or a policy (a folder or a hub id, "
         "owner/name); did you mean chosen?"),
        (["stage.opponent=chosen", "stage.win_temperatures=[inf]"],
         "stage.win_temperatures=[inf]: must be 0 (greedy) or 0.0001 to 10,000"),
        (["stage.opponent=./nowhere"], "stage.opponent=./nowhere: no such folder"),
        (["stage.opponent=chosen", "judge=http"],
         "judge=http: needs an endpoint; set the environment variable OPENAI_BASE_URL=<URL of an "
         "OpenAI-compatible server, such as http://localhost:8000/v1>, or OPENAI_API_KEY for "
         "OpenAI's; or use judge=reward_fn"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_loaded(monkeypatch, words, line):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert problems(["stage=evaluate", "model=tiny", *words]) == [line]


def test_without_any_verdict_there_is_no_figure(toy, tmp_path, monkeypatch):
    """A recipe would take the step for done; what the judge did say is kept, and cached."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    words = (
        f"model.path={toy.home / 'one'}", "stage.opponent=chosen", "judge=http", "stage.prompts=2",
        "judge.retries=0", "logger.plots=true",
    )  # fmt: skip
    with serving(lambda request: request.say("I cannot say.")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base)
        with pytest.raises(DataError, match=r"^judge http=gpt-4: no verdict on any of 2 matches"):
            evaluate(toy, tmp_path / "e", *words)
    said = (tmp_path / "e" / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["verdict"] for line in said] == ["error", "error"]
    assert not (tmp_path / "e" / "summary.json").exists()
    with serving(by_words) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base)
        with pytest.raises(DataError, match=r"judge\.max_calls=1 reached; start it again"):
            evaluate(toy, tmp_path / "f", *words, "judge.max_calls=1")


def test_a_policy_that_overflows_gives_no_figure(toy, tmp_path, monkeypatch):
    nan = lambda *args: torch.tensor([1.0, math.nan])  # noqa: E731
    monkeypatch.setattr(measure, "sequence_logprobs", nan)
    with pytest.raises(NonFiniteError, match="a log-probability is NaN"):
        evaluate(toy, tmp_path / "e", f"model.path={toy.home / 'one'}", "stage.prompts=2")


def test_opponents_that_may_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").mkdir()
    for named in ("chosen", "reference", "owner/name", tmp_path, "policy"):
        prepare(composed("stage=evaluate", "model=tiny", f"stage.opponent={named}"))


def test_the_judge_is_read_by_evaluations_only():
    words = ["stage=label", "stage.samples=.", "judge=http", "judge.model=m"]
    assert problems(words, typed=words) == [
        "judge=http: has no effect with stage=label; remove it",
        "judge.model=m: has no effect with stage=label; remove it",
    ]


# ---------------------------------------------------------------- the picture


def row(policy, temperature, wins, losses, ties=0):
    rate = win_rate(wins, losses, ties)
    return {"policy": policy, "opponent": "a/very/long/name/of/a/folder" * 3, "errors": 0,
            "judge": "http=a-model-with-a-name-that-is-long-itself", "temperature": temperature,
            "wins": wins, "losses": losses, "ties": ties, "unasked": 0,
            "win_rate": rate.value, "low": rate.low, "high": rate.high}  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        [row("runs/dpo", 1.0, 5000, 5000)],
        [row("a-name" * 40, t, 100, 0) for t in (0.0, 0.25, 0.5)] + [row("none", 1.0, 0, 0)],
        [row(f"runs/$dpo/{i}", 1.0, i, 40 - i, 3) for i in range(40)],
    ],
    ids=len,
)
def test_no_text_overlaps_another_or_leaves_the_picture(tmp_path, monkeypatch, rows):
    drawn = []
    monkeypatch.setattr(picture, "save_png", lambda figure, path: drawn.append(figure) or path)
    picture.draw_win_rates(tmp_path, rows)
    wide, narrow = drawn
    assert narrow.get_size_inches()[0] < wide.get_size_inches()[0]
    for figure in drawn:
        check_layout(figure, rows)


def check_layout(figure, rows):
    figure.draw_without_rendering()
    (axes,) = figure.axes
    bars = [patch.get_width() for patch in axes.patches]
    shown = rows[: picture.MAX_BARS]
    assert bars == [r["win_rate"] for r in shown if not math.isnan(r["win_rate"])]
    boxes = [(t.get_text(), t.get_window_extent()) for t in [*figure.texts, *axes.texts]]
    for text, box in boxes:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (one, other)
