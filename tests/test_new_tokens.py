"""Without a limit, completions take what the data's responses take; cut ones are told."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from dpo_cli.config import EvaluateConfig
from dpo_cli.errors import ConfigError
from dpo_cli.records import EncodedExample
from dpo_cli.report.console import Progress
from dpo_cli.report.page import write_run_report
from dpo_cli.session.lengths import finished_share, needed_tokens, unfinished_line, with_new_tokens
from judge_server import prefers_longer, serving
from small_runs import configure, train

QUICK = "train.max_steps=1", "train.sample_prompts=0"


def examples(lengths):
    ids = np.zeros(3, np.int32)
    return [EncodedExample(ids, (np.zeros(n, np.int32),), row) for row, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("lengths", "needed"),
    [([7], 7), (range(1, 101), 95), ([10] * 95 + [500] * 5, 10), ([10] * 94 + [500] * 6, 500)],
)
def test_the_95th_percentile_by_hand(lengths, needed):
    """At least 95 of 100 responses have that many tokens or fewer."""
    lengths = list(lengths)
    assert needed_tokens(examples(lengths)) == needed
    assert sum(n <= needed for n in lengths) >= 0.95 * len(lengths)


def test_a_limit_that_is_given_stays():
    notes = []
    rows = examples([5, 5])
    assert with_new_tokens(EvaluateConfig(max_new_tokens=3), rows, notes.append).max_new_tokens == 3
    assert not notes
    assert with_new_tokens(EvaluateConfig(), rows, notes.append).max_new_tokens == 5
    assert notes == ["stage.max_new_tokens=5: 95% of the data's responses are no longer"]
    assert unfinished_line(0.9, 5) is None
    assert unfinished_line(0.45, 5).startswith("only 45% of completions finished with EOS")


def test_the_console_of_ppo_shows_score_kl_and_finished_share():
    out = io.StringIO()
    with Progress("plain", Console(file=out, width=200)) as progress:
        progress.begin(2)
        progress.advance(1, {"loss": 0.1, "score": 1.25, "kl": 3.5, "rollout/finished": 0.16})
        progress.advance(2, {"eval/score": 0.5, "eval/kl": 2.0, "eval/finished": 0.75})
    first, *_, last = out.getvalue().splitlines()
    assert "score 1.250  KL 3.50  finished 16%" in first
    assert "held-out score 0.500  KL 2.00  finished 75%" in last


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    home = tmp_path_factory.mktemp("sft")
    train(home, "stage=sft", *QUICK)
    return home


def test_an_evaluation_and_its_page(sft, tmp_path, capsys):
    words = "stage=evaluate", f"model.path={sft}", "stage.prompts=4", "logger.progress=plain"
    summary = train(tmp_path / "e", *words)
    err = " ".join(capsys.readouterr().err.split())
    assert f"stage.max_new_tokens={summary['max_new_tokens']}: 95% of the data's" in err
    (point,) = (tmp_path / "e" / "points.jsonl").read_text().splitlines()
    assert json.loads(point)["max_new_tokens"] == summary["max_new_tokens"]
    train(tmp_path / "short", *words, "stage.max_new_tokens=1")
    assert "the others were truncated to 1 tokens" in " ".join(capsys.readouterr().err.split())
    page = " ".join((tmp_path / "short" / "report.html").read_text().split())
    assert "of the completions finished with EOS" in page


def test_ppo_and_sample_take_what_the_data_needs(sft, tmp_path, capsys):
    data = configure("data.rows=48", "data.eval_rows=12").data
    assert data.rows == 48
    ppo = (
        "stage=ppo-baseline", "stage.rollout_samples=8", "train.batch_size=8", "stage.ppo_epochs=1",
        "stage.normalize_prompts=4", "stage.eval_prompts=2", f"model.path={sft}", *QUICK,
        "logger.progress=plain",
    )  # fmt: skip
    train(tmp_path / "p", *ppo)
    assert "stage.max_new_tokens=" in capsys.readouterr().err
    rows = [json.loads(r) for r in (tmp_path / "p" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["eval/finished"] <= 1 for row in rows if "eval/score" in row)
    assert write_run_report(tmp_path / "p", {}).is_file()
    words = "stage=sample", f"model.path={sft}", "stage.prompts=2", "stage.eval_prompts=0"
    train(tmp_path / "s", *words, "logger.progress=plain", "stage.completions=1")
    assert "stage.max_new_tokens=" in capsys.readouterr().err


def test_the_finished_share_has_an_interval_of_its_prompts():
    """Wilson's interval of 3 in 4, worked by hand, though there are 8 completions."""
    found = finished_share([True] * 6 + [False] * 2, prompts=4)
    z2 = 1.959963984540054**2
    centre, half = (0.75 + z2 / 8) / (1 + z2 / 4), (z2 * (0.75 * 0.25 / 4 + z2 / 64)) ** 0.5
    half /= 1 + z2 / 4
    assert found["finished"] == 0.75
    assert found["finished_low"] == pytest.approx(centre - half)
    assert found["finished_high"] == pytest.approx(centre + half)


# reward_fn=none


def rows_of(tmp_path, times=1):
    """Every other chosen response repeats itself so many times."""
    path = tmp_path / "rows.jsonl"
    good = lambda n: f" good {n}" * (times if n % 2 else 1)  # noqa: E731
    rows = [
        {"prompt": f"a film {n}", "chosen": good(n), "rejected": f" bad {n}"} for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_rows_need_no_reward(sft, tmp_path):
    words = (
        "stage=evaluate", "data=jsonl", f"data.path={rows_of(tmp_path)}", "data.eval_rows=6",
        "logger=none", "hardware=cpu", "stage.prompts=4", "reward_fn=none",
    )  # fmt: skip
    config = configure(*words, f"model.path={sft}", f"stage.reference={sft}")
    assert config.reward_fn.name == "none"
    config.run_dir = str(tmp_path / "e")
    from dpo_cli.run import run

    summary = run(config, ["dpo-run"])
    assert {"kl", "tokens", "finished", "accuracy", "pairs"} <= summary.keys()
    assert "reward" not in summary
    assert summary["kl"] == pytest.approx(0, abs=1e-5)
    assert summary["accuracy"] == 0.5  # of a policy that is its own reference
    (point,) = (tmp_path / "e" / "points.jsonl").read_text().splitlines()
    assert json.loads(point)["reward"] is None
    samples = (tmp_path / "e" / "samples.jsonl").read_text().splitlines()
    assert all("reward" not in json.loads(line) for line in samples)


def test_a_judge_gives_win_rates_without_a_reward(sft, tmp_path, monkeypatch):
    """The judge prefers the longer of two texts: so does the test, from the texts it was shown."""
    from dpo_cli.run import run

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    words = (
        "stage=evaluate", "data=jsonl", f"data.path={rows_of(tmp_path, 20)}",
        "data.eval_rows=6", "logger=none", "hardware=cpu", "reward_fn=none", "judge=http",
        "judge.model=m",
        "stage.opponent=chosen", "stage.win_temperatures=[1.0]", "stage.max_new_tokens=4",
    )  # fmt: skip
    with serving(prefers_longer) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base)
        config = configure(*words, f"model.path={sft}", f"run_dir={tmp_path / 'e'}")
        summary = run(config, ["dpo-run"])
    verdicts = [json.loads(x) for x in (tmp_path / "e" / "verdicts.jsonl").read_text().splitlines()]
    assert {row["verdict"] for row in verdicts} >= {"win", "loss"}
    by_hand = []
    for row in verdicts:
        ours, theirs = len(row["completion"].strip()), len(row["other"].strip())
        by_hand.append(0.5 if ours == theirs else float(ours > theirs))
    assert summary["win_rate_t1"] == pytest.approx(sum(by_hand) / len(by_hand))
    assert summary["win_rate_t1_low"] < summary["win_rate_t1"] < summary["win_rate_t1_high"]
    assert "reward" not in summary
    assert server.calls > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stage=ppo-baseline", "reward_fn=none"],
            "reward_fn=none: stage=ppo-baseline needs a reward",
        ),
        (["stage=evaluate", "reward_fn=none", "stage.opponent=chosen"], "win rates need a judge"),
        (["stage=evaluate", "reward_fn=none", "stage.reference_samples=16"], "the optimum needs"),
    ],
)
def test_what_cannot_do_without_a_reward(words, message):
    with pytest.raises(ConfigError, match=message):
        configure("model=tiny", *words)


def test_a_reward_that_is_named_is_not_replaced():
    from dpo_cli.config.hydra import composed
    from dpo_cli.config.read import prepare

    words = ["stage=evaluate", "data=jsonl", "data.path=pyproject.toml", "reward_fn=sentiment"]
    with pytest.raises(ConfigError, match="reward_fn=sentiment: rates the reviews"):
        prepare(composed(words), words)
    words = words[:-1]
    assert prepare(composed(words), words).reward_fn.name == "none"
