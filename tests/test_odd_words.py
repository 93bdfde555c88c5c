"""Values of odd shapes on the command line are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_helpers import fails

HUGE = "9" * 400
WORDS = {  # what is given -> what is said of it
    f"stage=dpo stage.beta={HUGE}": "expected a number",
    f"stage=dpo stage.beta=1{'0' * 300}": "must be at most 1e+06",
    f"train.batch_size={HUGE}": "must be at most 1,000,000",
    f"seed={'9' * 5000}": "seed=",
    "seed=99999999999999999999": "must be at most 9,223,372,036,854,775,807",
    "seed=1e400": "expected a whole number",
    "seed=nan": "expected a whole number",
    "hardware.devices=2000000": "must be at most 1,024",
    "stage=evaluate stage.reference_samples=16 stage.best_of=[1,999999]": "at most 100,000",
    "stage=sample stage.temperatures=[1.0,1e-300]": "must be 0 (greedy) or 0.0001 to 10,000",
    "model=tiny model.architecture.layers=1000 model.architecture.hidden=65536": "random weights",
    "data.rows=1000000 stage=dpo data.responses=1000": "more than 10,000,000 reviews",
    "stage.name=[1]": "stage.name=[1]: unknown",
    "stage.name={a:1}": "unknown; one of",
    "data=[1,2]": "data=[1,2]: data takes one option's name",
    "data=[sentiment,jsonl]": "data takes one option's name",
    "data={a:1}": "choose an option, data=<name>",
    "logger=${oc.decode:'1'}": "logger",
    "hydra.run.dir=${..seed}": "hydra.run.dir",
    "hydra.run.dir=${nothing}": "hydra.run.dir",
    "hydra.job.env_set={A:{b:1}}": "env_set",
    "+data.chat_template_kwargs={1:2}": "expected names and values",
    "seed=${seed}": "seed",
    "seed=${oc.env:NO_SUCH_VARIABLE}": "NO_SUCH_VARIABLE",
    "data.path=${.name}x data=jsonl": "data.path=jsonlx: no such file or folder",
    "run_dir=[a]": "run_dir=['a']: expected text",
}


@pytest.mark.parametrize("words", WORDS)
def test_refused_in_one_line(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = fails(capsys, *words.split(), "dry_run=true")
    assert WORDS[words] in said
    assert "\n" not in said
    assert len(said) < 2100
    assert list(tmp_path.iterdir()) == []
