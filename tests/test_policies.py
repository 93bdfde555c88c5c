"""Which policies an evaluation finds in folders of runs, checkpoints and sweeps."""

from __future__ import annotations

import json

import pytest

from dpo_cli.errors import ConfigError, DataError
from dpo_cli.evaluation.policies import (
    POINT_KEYS,
    find_policies,
    method_of,
    reference_of,
    setting_of,
)
from small_runs import configure


def model(folder, **provenance):
    """A folder that passes for a model until it is loaded."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "dpo_run.json").write_text(json.dumps(provenance))
    return folder


def finished_run(folder, steps=(10, 20), seed=4, **provenance):
    model(folder / "final", **provenance)
    for step in steps:
        model(folder / "checkpoints" / f"step-{step}", **provenance)
    (folder / "config.yaml").write_text(f"seed: {seed}\n")
    lines = [{"step": 0, "eval/loss": 1.0}, *({"step": s, "loss": 0.5} for s in (1, 20))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def sweep_of(folder, exit_codes, **keys):
    """Job i has the i-th value of each key; the folders were moved after the sweep."""
    (folder / "jobs").mkdir(parents=True)
    for job, code in enumerate(exit_codes):
        overrides = {"stage": "dpo", **{key: values[job] for key, values in keys.items()}}
        record = {"job": job, "overrides": overrides, "exit_code": code, "run_dir": "/gone"}
        (folder / "jobs" / f"{job}.json").write_text(json.dumps(record))
        finished_run(folder / str(job), stage="dpo", loss="sigmoid")
    return folder


def found(*words, notes=None):
    config = configure("stage=evaluate", "model=custom", "data.eval_rows=4", *words)
    return find_policies(config, [].append if notes is None else notes.append)


def test_a_run_and_its_checkpoints(tmp_path):
    run = finished_run(tmp_path / "run", stage="dpo", loss="ipo")
    (point,) = found(f"stage.policies=[{run}]")
    assert (point.label, point.method, point.setting) == (str(run), "ipo", "")
    assert (point.step, point.seed, point.gradient_steps, point.samples) == (20, 4, 20, None)
    every = found(f"stage.policies=[{run}]", "stage.checkpoints=true", "stage.method=mine")
    assert [p.label for p in every] == [f"{run}/checkpoints/step-10", str(run)]
    assert [(p.step, p.method) for p in every] == [(10, "mine"), (20, "mine")]
    (alone,) = found(f"model.path={run}/checkpoints/step-10", "stage.checkpoints=true")
    assert (alone.step, alone.seed, alone.gradient_steps) == (10, 4, 10)


def test_rows_have_all_keys_of_the_contract(tmp_path):
    (point,) = found(f"model.path={finished_run(tmp_path / 'run', stage='sft')}")
    row = point.row({"reward": 1.0, "win_rate_t1": 0.5})
    assert list(row) == [*POINT_KEYS, "win_rate_t1"]
    assert (row["reward"], row["kl"], row["seed"], row["method"]) == (1.0, None, 4, "sft")


def test_a_model_that_is_no_run(tmp_path):
    (point,) = found(f"stage.policies=[{model(tmp_path / 'plain')}]", "seed=9")
    assert (point.method, point.step, point.seed, point.samples) == ("policy", None, 9, None)


def test_a_sweep_without_its_failed_jobs(tmp_path):
    keys = {"stage.beta": ["0.1", "0.5", "0.1"], "seed": ["1", "1", "2"], "optim.lr": ["1"] * 3}
    sweep, notes = sweep_of(tmp_path / "sweep", [0, 1, 0], **keys), []
    points = found(f"stage.policies=[{sweep},{sweep}/2]", notes=notes)
    assert [p.label for p in points] == [f"{sweep}/0", f"{sweep}/2"]  # the last one once
    assert [p.setting for p in points] == ["beta=0.1", "beta=0.1"]  # no seed: it has a column
    assert notes == [f"{sweep}: jobs 1 failed and are skipped"]
    assert setting_of(sweep / "1") == "beta=0.5"
    assert setting_of(tmp_path) == ""


def test_a_sweep_of_failures_is_refused(tmp_path):
    sweep = sweep_of(tmp_path / "sweep", [1, 74])
    with pytest.raises(ConfigError, match=r"^stage\.policies=.*: every job of this sweep failed$"):
        found(f"stage.policies=[{sweep}]")
    (sweep / "jobs" / "0.json").write_text('{"job": 0}')
    with pytest.raises(DataError, match=r"0\.json: is not a job of a sweep"):
        found(f"stage.policies=[{sweep}]")


def test_an_unfinished_run_is_refused(tmp_path):
    model(tmp_path / "run" / "checkpoints" / "step-5")
    with pytest.raises(ConfigError, match=r"^stage\.policies=.*no final/: resume it"):
        found(f"stage.policies=[{tmp_path}/run]")


def test_the_reference_is_the_one_they_were_trained_against(tmp_path):
    one, other = (str(model(tmp_path / name)) for name in ("ref", "another"))
    runs = [
        finished_run(tmp_path / "a", stage="dpo", reference=one),
        finished_run(tmp_path / "b", stage="dpo", reference=f"{other}/../ref"),
        finished_run(tmp_path / "c", stage="sft"),
        finished_run(tmp_path / "d", stage="dpo", reference=other),
    ]

    def reference(*chosen, named="null"):
        words = f"stage.policies=[{','.join(map(str, chosen))}]", f"stage.reference={named}"
        config = configure("stage=evaluate", "model=custom", *words)
        return reference_of(config.stage, find_policies(config, print))

    assert reference(*runs[:3]) == one
    assert reference(runs[2]) is None
    assert reference(*runs, named=other) == other
    with pytest.raises(ConfigError, match=r"stage\.reference=null: .*/a was .*/ref but .*/another"):
        reference(*runs)


def test_methods_by_loss():
    assert method_of({"stage": "dpo", "loss": "sigmoid"}) == "dpo"
    assert method_of({"stage": "dpo", "loss": "unlikelihood"}) == "unlikelihood"
    assert method_of({"stage": "ppo-baseline"}) == "ppo-baseline"
    assert method_of({"stage": "ppo-baseline", "advantage": "gae"}) == "ppo-baseline"
    assert method_of({"stage": "ppo-baseline", "advantage": "rloo"}) == "rloo"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stage.reference_samples=8", "reference_samples=8: too few to estimate the optimum"),
        ("stage.best_of=[2]", r"best_of=\[2\]: has no effect with stage.reference_samples=0"),
        ("stage.best_of=[0] stage.reference_samples=16", "must be at least 1"),
        ("stage.reference_samples=16 stage.optimum=.", "stage.optimum=.: has no effect"),
        ("stage.reference_samples=16 stage.temperature=0.7", "temperature=0.7: must be 1.0 with"),
        ("stage.checkpoints=true", "stage.checkpoints=true: needs runs"),
        ("stage.policies=[.] model.path=.", "model.path=.: has no effect with stage.policies"),
    ],
)
def test_evaluations_that_cannot_be_meant(words, message):
    with pytest.raises(ConfigError, match=message):
        configure("stage=evaluate", "model=tiny", *words.split())
