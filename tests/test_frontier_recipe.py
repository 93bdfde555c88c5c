"""The paper's comparison, scaled down to minutes' worth of processes: every method for real."""

import csv
import json

import pytest

SMALL = (
    "recipe=sentiment-frontier", "run_dir=f", "vars.seeds=[3]", "vars.rows=700", "vars.layers=1",
    "vars.prompts=40", "vars.completions=2", "vars.betas=[0.3,1]", "vars.alphas=[0.1]",
    "vars.target_kls=[1]", "vars.rollout_samples=128", "vars.ppo_batch=64", "vars.ppo_steps=8",
    "vars.unlikelihood_steps=2", "vars.evaluate_prompts=8", "vars.evaluate_completions=2",
    "vars.reference_samples=32",
)  # fmt: skip
METHODS = {"reference", "dpo", "unlikelihood", "preferred-ft", "ppo", "ppo-gt", "best-of-n",
           "optimum"}  # fmt: skip
COLUMNS = {"method", "seed", "setting", "step", "kl", "reward", "kl_se", "reward_se",
           "optimum_reward_at_kl"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)  # a process a step, some with jobs of their own
def test_every_method_is_measured_against_the_optimum(cli, tmp_path):
    done = cli(*SMALL, seconds=500)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "f" / "16-frontier"
    rows = list(csv.DictReader((folder / "frontier.csv").open()))
    assert set(rows[0]) >= COLUMNS
    assert {row["method"] for row in rows} == METHODS
    assert {row["seed"] for row in rows} == {"3"}
    assert {row["setting"] for row in rows if row["method"] == "dpo"} == {"beta=0.3", "beta=1"}
    for row in rows:
        assert float(row["kl"]) > -0.01
        assert 0.0 <= float(row["reward"]) <= 1.0
    ppo = [row for row in rows if row["method"] == "ppo"]
    assert {float(row["samples"]) for row in ppo} >= {256.0}
    provenance = json.loads((tmp_path / "f/07-reward-3/final/dpo_run.json").read_text())
    assert provenance["normalisation"]["std"] > 0
    assert (folder / "plots" / "frontier.png").stat().st_size > 10_000
    page = (tmp_path / "f" / "report.html").read_text()
    assert "preferred-ft" in page
    again = cli(*SMALL)
    assert again.returncode == 0
    assert again.stdout.count("skip") >= 16
