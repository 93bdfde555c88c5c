"""report.html of a recipe: its models side by side, its steps, their pictures once."""

from __future__ import annotations

import json

from page_runs import POINTS, Page, dpo_run, evaluation, jsonl, outcome, recipe_report


def test_a_recipe_compares_its_models(tmp_path):
    steps = [evaluation(tmp_path / "01-a", 0.5), evaluation(tmp_path / "02-b", 0.7621)]
    page = recipe_report(tmp_path, steps)
    assert page.texts["h1"] == ["Recipe small"]
    assert "From SFT to DPO: reward from 0.500 to 0.762, " in page.text
    head, *rows = page.rows("Figures with their standard errors")
    assert head == ["", "SFT", "DPO"]
    assert rows[0] == ["Reward", "0.500 ± 0.015", "0.762 ± 0.015"]
    assert page.texts["h3"] == ["01-a", "02-b"]
    table = page.rows("Minutes spent on what is in the folders, in any start")
    assert table[1] == ["01-a", "ran", "1.5", "dpo-run stage=evaluate"]
    assert "SFT: 0.500" in page.text


def test_none_of_several_alternatives_is_the_outcome(tmp_path):
    steps = [evaluation(tmp_path / f"0{n}", r) for n, r in enumerate((0.5, 0.7621, 0.51))]
    report = [
        {"label": name, "folders": [str(step)]}
        for name, step in zip(("SFT", "DPO", "DPOP"), steps, strict=True)
    ]
    page = recipe_report(tmp_path, steps, report=report)
    assert "Reward: SFT 0.500 (KL 1.819), DPO 0.762 (KL 1.819), DPOP 0.510 (KL 1.819)." in page.text
    assert "From SFT" not in page.text
    assert "SFT: 0.500" not in page.text


def test_repeats_are_averaged(tmp_path):
    """0.5 and 0.7: mean 0.6, standard deviation 0.2 / sqrt(2) = 0.1414."""
    steps = [evaluation(tmp_path / f"01-a-{n}", r) for n, r in enumerate((0.5, 0.7))]
    actions = zip(steps, ("run", "skip"), strict=True)
    page = recipe_report(
        tmp_path,
        steps,
        steps=[outcome(step, step="01-a", action=action) for step, action in actions],
        report=[{"label": "A", "folders": [str(step) for step in steps]}],
        repeat={"seed": [0, 1]},
    )
    rows = page.rows("Means of 2 runs, ± standard deviations")
    assert rows[1] == ["Reward", "0.600 ± 0.141"]
    assert page.texts["h3"] == ["01-a x2"]
    table = page.rows("Minutes spent on what is in the folders, in any start")
    assert table[1][:3] == ["01-a x2", "1 ran, 1 skipped", "3.0"]


def test_a_picture_is_in_a_recipe_once(tmp_path):
    frontier = evaluation(
        tmp_path / "02-f", 0.5, pictures=("frontier",), points_jsonl=jsonl(POINTS)
    )
    page = recipe_report(tmp_path, [dpo_run(tmp_path / "01-d"), frontier])
    alts = [image["alt"] for image in page.all("img")]
    assert alts[0] == (
        "Reward against KL of 2 policies; dpo beta=0.1, step 40 reaches 0.930 at 5.200 nats."
    )
    assert [alt.split()[0] for alt in alts] == ["Reward", "Curves"]


def test_a_sweep_is_a_step(tmp_path):
    folder = tmp_path / "01-sweep"
    folder.mkdir()
    (folder / "sweep.csv").write_text(
        "job,stage.beta,status,eval/loss,run_dir\n0,0.1,done,0.61,x\n1,1,done,0.65,y\n"
    )
    record = {"inputs": {"overrides": ["stage=dpo", "stage.beta=0.1,1"]}}
    (tmp_path / "01-sweep.json").write_text(json.dumps(record))
    page = recipe_report(tmp_path, [folder, dpo_run(tmp_path / "02-d")])
    assert page.rows("Jobs, settings and figures") == [
        ["job", "stage.beta", "status", "Held-out loss"],
        ["0", "0.1", "done", "0.610"], ["1", "1", "done", "0.650"],
    ]  # fmt: skip
    assert "dpo-run -m stage=dpo stage.beta=0.1,1" in page.text


def test_losses_of_two_stages_are_not_compared(tmp_path):
    """SFT's negative log-likelihood is not DPO's loss; training batches are not held-out rows."""
    sft = dpo_run(
        tmp_path / "01-sft", config={"stage": {"name": "sft"}, "model": {"name": "tiny"}},
        summary={"stage": "sft", "first/eval/loss": 5.9, "eval/loss": 5.152, "loss": 5.0},
    )  # fmt: skip
    bounds = {"eval/rewards/accuracies_low": 0.57, "eval/rewards/accuracies_high": 0.69}
    summary = {
        "stage": "dpo", "first/eval/loss": 0.6931, "eval/loss": 0.6912, "loss": 0.61,
        "first/eval/rewards/accuracies": 0.5, "eval/rewards/accuracies": 0.632, **bounds,
        "rewards/accuracies": 0.656, "rewards/margins": 0.3, "finished": 0.5,
    }  # fmt: skip
    page = recipe_report(tmp_path, [sft, dpo_run(tmp_path / "02-dpo", summary=summary)])
    told = " ".join(page.text.split())
    assert (
        "DPO: held-out preference accuracy 63.2% (57.0% to 69.0%) (50.0% before), held-out loss "
        "0.691 (0.693 before)." in told
    )
    top = told[: told.index("Figures with their standard errors; a loss is each method's own")]
    for figure in ("5.152", "5.15", "65.6%", "0.610", "SFT: "):
        assert figure not in top


def test_figures_of_training_are_called_so_without_held_out_rows(tmp_path):
    summary = {"stage": "dpo", "first/loss": 0.6931, "loss": 0.5, "rewards/accuracies": 0.75}
    runs = [dpo_run(tmp_path / name, summary=summary) for name in ("01-a", "02-b")]
    told = " ".join(recipe_report(tmp_path, runs).text.split())
    assert "training preference accuracy from 75.0% to 75.0%, training loss from" in told
    assert "Held-out" not in told.partition("Completions")[0]


RECIPE = """\
description: One step
steps:
  - name: sft
    overrides: {stage: sft, model: tiny, data: sentiment, data.rows: 16, data.eval_rows: 4,
                train.max_steps: 1, train.batch_size: 4, train.sample_prompts: 1, logger: none}
report: [{label: SFT, step: sft}]
"""


def test_a_recipe_writes_its_report(cli, tmp_path):
    (tmp_path / "small.yaml").write_text(RECIPE)
    done = cli("recipe=./small.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "report: runs/small/report.html" in done.stdout.splitlines()
    page = Page(tmp_path / "runs" / "small" / "report.html")
    assert page.texts["h1"] == ["Recipe small"]
    assert page.texts["h3"] == ["01-sft"]
    assert not (tmp_path / "runs" / "small" / "01-sft" / "report.html").exists()  # logger=none
