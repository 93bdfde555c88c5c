"""A canary goes through every path by which a secret can reach a file: none may hold it.

It has spaces, quotes and more characters than YAML writes on a line; each of its words is one that
no file has by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cli_helpers import Starts
from dpo_cli import cli
from dpo_cli.config.literals import as_override
from dpo_cli.durable import write_json, write_text
from dpo_cli.durable.redact import redact, unkept
from dpo_cli.errors import ConfigError
from dpo_cli.run_folder import merge_overrides
from dpo_cli.session.prompts import write_rows
from dpo_cli.workflow import child
from small_runs import TINY, configure, train

pytest_plugins = ["cli_fixtures"]

CANARY = 'canary\'s "yellow feathers" ' + " ".join(f"canary{i}" for i in range(30))
OTHER = "sparrow in a hand, sparrow's nest: {twigs}"
SHAPE = "hf_" + "Ca1" * 11
ENV_SET = as_override("+hydra.job.env_set.JUDGE_PAT", OTHER)
WORDS = ["canary", "yellow feathers", "sparrow", "twigs", "Ca1Ca1", "hunter2", "letmein"]

# Stands in for `dpo-run`: leaves a summary, and whether it was given the secrets.
STUB = """
import json, pathlib, sys
words = sys.argv[1:]
values = dict(word.split("=", 1) for word in words if "=" in word)
place = values.get("resume") or values.get("run_dir") or values["hydra.sweep.dir"]
folder = pathlib.Path(place.strip("'"))
folder.mkdir(parents=True, exist_ok=True)
given = any("feathers" in word for word in words)
(folder / "given.json").write_text(json.dumps(given))
if pathlib.Path("stop").exists():
    (folder / "checkpoints/step-1").mkdir(parents=True)
    (folder / ".hydra").mkdir()
    (folder / ".hydra/overrides.yaml").write_text(pathlib.Path("stop").read_text())
    sys.exit(75)
(folder / "summary.json").write_text(json.dumps({"stage": "x", "reward": 0.5}))
"""
RECIPE = """
description: a small one
vars: {note: none, api_key: none}
steps:
  - name: sft
    overrides: {stage: sft, logger.wandb_project: "${vars.note} ${vars.api_key}"}
  - name: grid
    overrides: [stage=sft, "seed=1,2", "logger.wandb_project=${vars.note}"]
    sweep: true
report: [{label: ours, step: sft}]
"""


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASS", CANARY)
    monkeypatch.setenv("HOOK", CANARY.replace("canary", "pigeon"))  # no secret by its name
    monkeypatch.setattr(sys, "argv", ["dpo-run"])
    monkeypatch.delenv("DPO_RUN_SECRET_API_KEY", raising=False)  # a recipe sets it


@pytest.fixture
def stub(empty: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(child, "child_command", lambda: [sys.executable, str(script)])
    return empty


def leaks(folder: Path) -> list[str]:
    """Files and names below a folder that hold a word of a secret."""
    found = []
    for path in folder.rglob("*"):
        text = str(path.relative_to(folder))
        if path.is_file():
            text += path.read_bytes().decode(errors="replace")
        found += [f"{path.name}: {word}" for word in WORDS if word in text]
    return found


def run_cli(*words: str) -> int:
    try:
        cli.main(list(words))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_what_a_run_was_composed_of(empty: Path, starts: Starts) -> None:
    cli.main(["run_dir=a", "logger.wandb_project=${oc.env:DB_PASS}", ENV_SET,
              "+hydra.job.env_set.A_SECRET=hunter2", "model.name=" + SHAPE,
              as_override("logger.name", "https://me:letmein@host/x")])  # fmt: skip
    assert starts[0][0].logger.wandb_project == CANARY
    assert leaks(empty) == []
    stored = OmegaConf.load(empty / "a/.hydra/config.yaml")
    assert OmegaConf.to_container(stored)["logger"]["wandb_project"] == "${oc.env:DB_PASS}"


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    """Trained, with its model card, its report and its samples."""
    words = [as_override("logger.wandb_project", CANARY), "stage=sft", "train.max_steps=1"]
    train(tmp_path / "run", *words, f"model.name={SHAPE}")
    assert leaks(tmp_path) == []
    assert "[redacted]" in (tmp_path / "run/config.yaml").read_text()
    assert "[redacted]" in (tmp_path / "run/command.txt").read_text()


def test_the_folder_of_a_sweep(stub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    note = as_override("logger.wandb_project", CANARY)
    assert run_cli("-m", "stage=sft", "seed=1,2", note, ENV_SET, "hydra.sweep.dir=s",
                   "hydra.output_subdir=own", "logger.name=" + SHAPE) == 0  # fmt: skip
    assert leaks(stub) == []
    assert not any(word in "".join(capfd.readouterr()) for word in WORDS)
    assert (stub / "s/multirun.yaml").is_file()
    assert json.loads((stub / "s/1/given.json").read_text())
    before = (stub / "s/jobs/0.json").read_bytes()
    again = ["-m", "stage=sft", "seed=1,2", note, ENV_SET, "hydra.output_subdir=own"]
    assert run_cli(*again, "logger.name=" + SHAPE, "hydra.sweep.dir=s", "resume=true") == 0
    assert (stub / "s/jobs/0.json").read_bytes() == before  # found finished
    assert leaks(stub) == []


def test_a_job_that_goes_on_is_given_its_secret_again(stub: Path) -> None:
    note = as_override("logger.wandb_project", CANARY)
    stored = redact(["stage=sft", "seed=4", note])
    (stub / "stop").write_text(OmegaConf.to_yaml(OmegaConf.create(stored)))
    sweep = ["-m", "stage=sft", "seed=4,5", note, "hydra.sweep.dir=s"]
    assert run_cli(*sweep) == 75
    (stub / "s/0/given.json").unlink()
    (stub / "stop").unlink()
    assert run_cli(*sweep, "resume=true") == 0
    assert json.loads((stub / "s/0/given.json").read_text())
    assert not (stub / "s/old/0-1").exists()  # it went on
    assert leaks(stub) == []


def test_the_folder_of_a_recipe(stub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (stub / "small.yaml").write_text(RECIPE)
    words = ["recipe=small.yaml", f"vars.note={CANARY}", "vars.api_key=hunter2-hunter2"]
    assert run_cli(*words, "run_dir=r") == 0
    (stub / "small.yaml").unlink()
    assert leaks(stub) == []
    capfd.readouterr()
    (stub / "small.yaml").write_text(RECIPE)
    assert run_cli(*words, "run_dir=r") == 0
    out = capfd.readouterr().out
    assert "sft: skip" in out  # the blanked record is still that of these words
    assert not any(word in out for word in WORDS)


def test_rows_and_other_files_that_stages_write(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {CANARY}", "completions": [SHAPE]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_json(tmp_path / "a.json", {CANARY: [CANARY]})
    write_text(tmp_path / "a.csv", f'label,"{CANARY}"\n')
    assert leaks(tmp_path) == []
    assert json.loads((tmp_path / "rows.jsonl").read_text())["completions"] == ["[redacted]"]


def test_a_resumed_run_asks_for_what_its_folder_does_not_keep() -> None:
    stored = redact(["seed=1", ENV_SET])
    with pytest.raises(ConfigError, match=r"^hydra\.job\.env_set\.JUDGE_PAT: held a secret, which"):
        merge_overrides(stored, ["run_dir=a"])
    assert merge_overrides(stored, [ENV_SET]) == ["seed=1", ENV_SET]
    assert unkept(["seed=1", ENV_SET, "optim.lr=${oc.env:DB_PASS}"]) == [ENV_SET]


def test_settings_that_hold_no_secret_are_as_they_were() -> None:
    """Names of keys with TOKEN, KEY or PASS in them, and every key there is."""
    from dataclasses import asdict

    for stage in ("dpo", "sft", "evaluate", "ppo-baseline"):
        config: dict[str, Any] = asdict(configure(*TINY, f"stage={stage}"))
        assert redact(config) == json.loads(json.dumps(config))
    words = ["train.micro_batch_tokens=4096", "model.tokenizer=owner/name", "vars.text_key=column",
             "data.prompt_field=passage", "run_dir=/home/author/path"]  # fmt: skip
    assert redact(words) == words
