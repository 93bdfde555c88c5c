"""The loss of reward models against TRL's formula and numbers worked by hand."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpo_cli.losses import reward_loss

PAIRS = torch.tensor([[1.5, 0.5], [-1.0, 2.0]])  # r_w - r_l = 1, -3


def test_loss_by_hand():
    expected = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))]
    assert reward_loss(PAIRS).tolist() == pytest.approx(expected, abs=1e-6)


def test_margins_label_smoothing_and_centring_by_hand():
    margins = torch.tensor([0.5, -1.0])  # what is left: 0.5, -2
    nll = lambda z: math.log(1 + math.exp(-z))  # noqa: E731
    with_margins = [nll(0.5), nll(-2.0)]
    assert reward_loss(PAIRS, margins).tolist() == pytest.approx(with_margins, abs=1e-6)
    smoothed = [0.9 * nll(0.5) + 0.1 * nll(-0.5), 0.9 * nll(-2.0) + 0.1 * nll(2.0)]
    assert reward_loss(PAIRS, margins, 0.1).tolist() == pytest.approx(smoothed, abs=1e-6)
    centred = [nll(1.0) + 0.25 * 2.0**2, nll(-3.0) + 0.25 * 1.0**2]
    assert reward_loss(PAIRS, None, 0.0, 0.25).tolist() == pytest.approx(centred, abs=1e-6)


def test_lists_are_plackett_luce():
    rewards = torch.tensor([[0.3, -1.2, 2.0]])
    total = sum(
        math.exp(-reward_loss(rewards[:, list(order)]).item())
        for order in itertools.permutations(range(3))
    )
    assert total == pytest.approx(1.0, abs=1e-6)
    e = math.exp
    first = e(0.3) / (e(0.3) + e(-1.2) + e(2.0)) * e(-1.2) / (e(-1.2) + e(2.0))
    assert reward_loss(rewards).item() == pytest.approx(-math.log(first), abs=1e-6)


@pytest.mark.parametrize("coefficient", [None, 0.01])
@pytest.mark.parametrize("with_margins", [False, True])
def test_loss_and_gradient_are_those_of_trl(coefficient, with_margins):
    """TRL's `compute_loss` given the rewards by a stand-in model."""
    trainer = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer
    torch.manual_seed(1)
    values, margins = torch.randn(6, 2, requires_grad=True), torch.rand(6)
    stand_in = SimpleNamespace(
        model=torch.nn.Identity(), args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    logits = values.T.reshape(-1, 1)  # all chosen, then all rejected
    inputs = {"attention_mask": torch.ones(12, 3)} | ({"margin": margins} if with_margins else {})
    theirs = trainer.compute_loss(stand_in, lambda **_: SimpleNamespace(logits=logits), inputs)
    ours = reward_loss(values, margins if with_margins else None, 0.0, coefficient or 0.0).mean()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(x, values) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
