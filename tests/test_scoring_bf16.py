"""A reward model's scores in bfloat16, as on CUDA, against its float32 scores."""

import numpy as np
import pytest
import torch

from dpo_cli.model.attention.interface import kernel_of
from dpo_cli.rewards import scoring
from dpo_cli.rewards.scorers import Completed
from dpo_cli.train.runtime import Runtime
from scoring_helpers import session_of
from small_runs import TINY, configure, train

REWARD = ("stage=reward", "train.max_steps=24", "optim.lr=3e-3", "data.rows=200",
          "stage.normalize_prompts=0", "model.architecture.hidden=64")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small reward model, and completions of the data that it ranks."""
    from dpo_cli.data.dataset import load_splits

    folder = tmp_path_factory.mktemp("runs") / "reward"
    train(folder, *REWARD)
    data = configure(*TINY, *REWARD[:1], "data.rows=60").data
    rows = [
        Completed(example.prompt, text)
        for example in load_splits(data, 7).train
        for text in example.responses
    ]
    return folder, rows


def scorer_in(dtype, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "scoring_dtype", lambda runtime: dtype)
    session, _ = session_of(tmp_path, "reward_fn=reward_model", f"reward_fn.path={folder}")
    return scoring.load_scorer(session)


def ranks_of(values):
    return np.argsort(np.argsort(values))


def test_bf16_scores_rank_completions_as_float32_does(trained, tmp_path, monkeypatch):
    folder, rows = trained
    exact, near = (
        np.array(scorer_in(dtype, folder, tmp_path, monkeypatch)(rows))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact.std() > 0.05  # it has learnt to tell them apart
    assert 0 < np.abs(near - exact).max() < 0.03 * exact.std()
    assert np.corrcoef(ranks_of(near), ranks_of(exact))[0, 1] > 0.999


def test_a_bf16_score_is_the_same_alone_and_among_others(trained, tmp_path, monkeypatch):
    """Up to bf16's rounding, and exactly for equals in one call."""
    folder, rows = trained
    score = scorer_in(torch.bfloat16, folder, tmp_path, monkeypatch)
    together = score([*rows[:20], rows[0]])
    assert together[0] == together[20]
    alone = [score([row])[0] for row in rows[:20]]
    assert np.abs(np.array(alone) - together[:20]).max() < 0.02 * np.std(score(rows))


def test_rounding_the_products_once_changes_no_score(trained, tmp_path, monkeypatch):
    """Autocast over float32 weights, as in training, is the same to the bit."""
    folder, rows = trained
    once = scorer_in(torch.bfloat16, folder, tmp_path, monkeypatch)
    assert {p.dtype for p in once.model.parameters()} == {torch.float32, torch.bfloat16}
    monkeypatch.setattr(scoring, "round_products", lambda model, dtype: None)
    again = scorer_in(torch.bfloat16, folder, tmp_path, monkeypatch)
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    assert once(rows) == again(rows)
    assert kernel_of(once.model) == kernel_of(again.model)


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [
        ("cuda", "bf16", torch.bfloat16),
        ("cuda", "fp32", torch.float32),
        ("cpu", "bf16", torch.float32),
        ("cpu", "fp32", torch.float32),
    ],
)
def test_bf16_is_for_cuda_runs_in_bf16(device, precision, dtype):
    assert scoring.scoring_dtype(Runtime(torch.device(device), precision)) == dtype
