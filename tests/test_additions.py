"""CONTRIBUTING's table, tried: a dataset, a loss, a reward, a stage and a metric sink are added to
a copy of the package with exactly the files and lines that the table names, and used together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

NEW = {  # file -> contents
    "dpo_cli/data/adapters/letters.py": '''
"""Rows {question, good, bad}."""

from dpo_cli.records import PreferenceExample


def parse(row, index, config):
    yield PreferenceExample(row["question"], (row["good"], row["bad"]), index)
''',
    "conf/data/letters.yaml": "# Questions with a good and a bad answer each.\neval_rows: 4\n",
    "conf/reward_fn/vowels.yaml": "# The share of vowels in a completion.\n",
    "dpo_cli/stages/count.py": '''
"""stage=count: how many rows there are."""


def run(session):
    from dpo_cli.data.dataset import load_splits

    splits = load_splits(session.config.data, session.config.seed, None)
    return {"rows": float(len(splits.train) * session.config.stage.factor)}
''',
    "dpo_cli/config/stages/count.py": '''
"""Counting rows: its keys."""

from dataclasses import dataclass

from dpo_cli.config.keys import above, key
from dpo_cli.config.stages.base import StageConfig, StageSpec


@dataclass
class CountConfig(StageConfig):
    name: str = key("count", "which stage")
    factor: float = key(1.0, "rows count as many", bound=above(0))


SPEC = StageSpec(CountConfig, title="Count", parallel=False)
''',
    "conf/stage/count.yaml": "# How many rows there are to train on.\nfactor: 2.0\n",
}
LOSS = """"squared": Loss(
    lambda logprobs, beta=0.1: (beta * logprobs.logratios.diff(dim=1)[:, 0] + 1) ** 2,
    "Squared DPO", "a squared loss",
),
"""
REWARD = '"vowels": lambda rows: [float(sum(map(r.completion.count, "aeiou"))) for r in rows], '
LINES = [  # file, what stands there, what is put behind it
    ("dpo_cli/data/adapters/__init__.py", "from dpo_cli.data.adapters import ", "letters, "),
    ("dpo_cli/data/adapters/__init__.py", "ADAPTERS: dict[str, Adapter] = {",
     '"letters": letters.parse, '),
    ("dpo_cli/config/datasets.py", "DATA_SCHEMAS: dict[str, type[DataConfig]] = {",
     '"letters": DataConfig, '),
    ("dpo_cli/losses/__init__.py", "LOSSES: dict[str, Loss] = {", LOSS),
    ("dpo_cli/rewards/scorers.py", "SCORERS: dict[str, Scorer] = {", REWARD),
    ("dpo_cli/config/rewards.py", "REWARD_FN_SCHEMAS: dict[str, type[RewardFnConfig]] = {",
     '"vowels": RewardFnConfig, '),
    ("dpo_cli/config/stages/__init__.py", "from dpo_cli.config.stages import (", "count, "),
    ("dpo_cli/config/stages/__init__.py", "STAGES: dict[str, StageSpec] = {",
     '"count": count.SPEC, '),
    ("dpo_cli/config/schema.py", 'tensorboard: bool = key(True, "write TensorBoard events")',
     '; csv: bool = key(False, "write steps.csv")'),
    ("dpo_cli/report/sinks.py", "LoggerConfig, dict[str, Any]], Sink]] = {", '"csv": CsvSink, '),
]  # fmt: skip
SINK = """
class CsvSink:
    def __init__(self, run_dir, step, logger, config):
        self._file = (run_dir / "steps.csv").open("a")

    def write(self, step, values):
        print(step, len(values), sep=",", file=self._file)

    def close(self):
        self._file.close()


SINKS: dict"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all additions, and rows for them."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("dpo_cli", "conf", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in NEW.items():
        assert not (folder / name).exists()
        (folder / name).write_text(text.lstrip("\n"))
    for name, line, added in LINES:
        text = (folder / name).read_text()
        assert text.count(line) == 1, (name, line)
        (folder / name).write_text(text.replace(line, line + added))
    sinks = folder / "dpo_cli/report/sinks.py"
    sinks.write_text(sinks.read_text().replace("\nSINKS: dict", SINK, 1))
    rows = [{"question": f"Number {i}?", "good": f" yes {i}", "bad": " no"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(checkout: Path, env: dict[str, str], *words: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", "dpo_cli", *words, "hardware=cpu", "logger.progress=plain"],
        cwd=checkout, env=env | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True,
        timeout=110, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_loss_a_dataset_and_a_sink(checkout: Path, clean_env: dict[str, str]) -> None:
    command(
        checkout, clean_env, "stage=dpo", "stage.loss=squared", "data=letters",
        "data.path=rows.jsonl", "logger=none", "logger.csv=true", "run_dir=dpo",
        "train.batch_size=8", "model.architecture.layers=1", "train.sample_prompts=0",
    )  # fmt: skip
    rows = [json.loads(line) for line in (checkout / "dpo/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(1)  # (0.1 * 0 - 1)^2: the policy is its own reference
    assert len((checkout / "dpo/steps.csv").read_text().splitlines()) == len(rows)
    card = (checkout / "dpo/final/README.md").read_text()
    assert "a squared loss" in card


def test_a_reward(checkout: Path, clean_env: dict[str, str]) -> None:
    command(
        checkout, clean_env, "stage=evaluate", "reward_fn=vowels", "data=letters",
        "data.path=rows.jsonl", "run_dir=evaluated", "stage.max_new_tokens=4",
    )  # fmt: skip
    assert json.loads((checkout / "evaluated/summary.json").read_text())["reward"] >= 0


def test_a_stage(checkout: Path, clean_env: dict[str, str]) -> None:
    command(
        checkout,
        clean_env,
        "stage=count",
        "data=letters",
        "data.path=rows.jsonl",
        "run_dir=counted",
    )
    assert json.loads((checkout / "counted/summary.json").read_text())["rows"] == 32  # 16 x 2
    told = command(checkout, clean_env, "stage=count", "--help")
    assert "stage.factor=2.0" in told
    assert "rows count as many" in told
