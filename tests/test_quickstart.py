"""`make demo`'s recipe, scaled down: every step for real, then nothing left to do."""

import json

import pytest

SMALL = ("recipe=quickstart", "run_dir=q", "vars.rows=320", "vars.prompts=12",
         "vars.eval_prompts=6", "vars.evaluate_prompts=8", "vars.reference_samples=16")  # fmt: skip


@pytest.mark.slow  # `make demo` is the whole of it
def test_quickstart_runs_and_then_skips(cli, tmp_path):
    first = cli(*SMALL)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "Comparison" in first.stdout
    assert "reward" in first.stdout
    sft, dpo = (
        json.loads((tmp_path / "q" / step / "summary.json").read_text())
        for step in ("05-evaluate-sft", "06-evaluate-dpo")
    )
    assert sft["kl"] == 0.0
    assert sft["accuracy"] == 0.5
    assert dpo["kl"] > 0.0
    assert 0.0 <= dpo["reward"] <= 1.0
    pairs = [json.loads(line) for line in (tmp_path / "q/03-label/train.jsonl").open()]
    assert all(row["scores"][0] > row["scores"][1] for row in pairs)
    trained = json.loads((tmp_path / "q/04-dpo/summary.json").read_text())
    assert abs(trained["first/loss"] - 0.693147) < 1e-4
    frontier = (tmp_path / "q/07-frontier/frontier.csv").read_text()
    assert {line.split(",")[0] for line in frontier.splitlines()[1:]} >= {"sft", "dpo", "optimum"}
    assert (tmp_path / "q/report.html").is_file()
    again = cli(*SMALL)
    assert again.returncode == 0
    assert again.stdout.count("skipped") == 7
    changed = cli(*SMALL, "vars.beta=0.2", "dry_run=true")
    assert changed.returncode == 0
    assert "evaluate-dpo" in changed.stdout
