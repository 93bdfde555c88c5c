"""Passes that only score or measure, in smaller rows where memory runs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.evaluation import measure
from dpo_cli.rewards import implicit, scoring
from dpo_cli.run import run
from dpo_cli.train.memory import TokenBudget, within
from small_runs import configure, train
from test_memory import Machine

SMALL = ("data.rows=24", "data.eval_rows=8", "train.max_steps=2", "train.sample_prompts=0")


def go(folder: Path, *words: str) -> dict[str, Any]:
    common = ("data=sentiment", "data.rows=24", "data.eval_rows=8", "hardware=cpu", "logger=none",
              "logger.progress=off", "model=custom", f"run_dir={folder}")  # fmt: skip
    return run(configure(*common, *words), ["dpo-run"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, one tuned from it, a reward model, labelled pairs."""
    base = tmp_path_factory.mktemp("base")
    sft = f"model.path={base / 'sft'}"
    train(base / "sft", *SMALL, "stage=sft")
    train(base / "dpo", *SMALL, "stage=dpo", sft, "optim.lr=1e-2")
    train(base / "reward", *SMALL[:3], "stage=reward", sft, "stage.normalize_prompts=0")
    go(base / "samples", sft, "stage=sample", "stage.completions=4", "stage.max_new_tokens=8")
    go(base / "pairs", sft, "stage=label", f"stage.samples={base / 'samples'}", "reward_fn=length")
    return base


def short(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Machine:
    """A machine on which the function fails for rows of more than 60 tokens."""
    machine, real = Machine(most=60), getattr(module, name)
    broken = machine.breaking(lambda batch, model: real(model, batch))
    monkeypatch.setattr(module, name, lambda model, batch: broken(batch, model))
    return machine


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("hidden_states", marks=pytest.mark.slow),
        "sequence_logprobs",
        pytest.param("rewards", marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_finds_its_room(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words = ("stage=evaluate", f"model.path={trained / 'dpo'}", "stage.prompts=8",
             "stage.completions=3", "stage.max_new_tokens=8", "reward_fn=reward_model",
             f"reward_fn.path={trained / 'reward'}",
             f"stage.pairs={trained / 'pairs' / 'train.jsonl'}")  # fmt: skip
    exact = go(tmp_path / "plain", *words)
    machine = short(monkeypatch, scoring if name == "rewards" else measure, name)
    found = go(tmp_path / "tight", *words)
    assert machine.failures
    for figure in ("reward", "kl", "kl_sampled", "accuracy", "likelihood_accuracy", "pairs"):
        assert found[figure] == pytest.approx(exact[figure], abs=1e-4)


def test_implicit_labels_find_their_room(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("stage=label", "stage.by=implicit", f"stage.samples={trained / 'samples'}",
             f"model.path={trained / 'dpo'}")  # fmt: skip
    go(tmp_path / "plain", *words)
    machine = short(monkeypatch, implicit, "sequence_logprobs")
    go(tmp_path / "tight", *words)
    assert machine.failures
    rows = [[json.loads(line) for line in (tmp_path / n / "train.jsonl").read_text().splitlines()]
            for n in ("plain", "tight")]  # fmt: skip
    scores = [[score for row in table for score in row["scores"]] for table in rows]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_pass_within_another_leaves_its_budget_in_use() -> None:
    """Ranks start again for memory that runs out later in the outer one."""
    budget, seen = TokenBudget(64), []

    def inner() -> None:
        seen.append(budget.in_use)

    def outer() -> None:
        within(budget, torch.device("cpu"), seen.append, inner)
        seen.append(budget.in_use)

    within(budget, torch.device("cpu"), seen.append, outer)
    assert seen == [True, True]
    assert not budget.in_use
