"""PPO's formulas against numbers worked by hand and against their definitions."""

import math

import pytest
import torch

from dpo_cli.logprobs import Head, logits_of
from dpo_cli.losses.ppo import (
    AdaptiveKl,
    FixedKl,
    advantages_and_returns,
    explained_variance,
    fit_normalizer,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from dpo_cli.stages.rollout import at_temperature


def test_hand_worked_rewards_advantages_and_returns():
    """Two completions, of 2 tokens and of 1; gamma 0.5, lambda 0.5, KL weight 0.1.

    Rewards: -0.1 * 1 = -0.1; -0.1 * -2 + 3 = 3.2 | -0.1 * 4 - 1 = -1.4.
    First: delta_2 = 3.2 - 2 = 1.2; delta_1 = -0.1 + 0.5 * 2 - 1 = -0.1,
    A_1 = -0.1 + 0.25 * 1.2 = 0.2. Second: -1.4 - 0.5 = -1.9.
    """
    lengths = torch.tensor([2, 1])
    scores, logratios = torch.tensor([3.0, -1.0]), torch.tensor([1.0, -2.0, 4.0])
    rewards = token_rewards(scores, logratios, lengths, 0.1)
    assert rewards.tolist() == pytest.approx([-0.1, 3.2, -1.4])
    values = torch.tensor([1.0, 2.0, 0.5])
    advantages, returns = advantages_and_returns(rewards, values, lengths, 0.5, 0.5)
    assert advantages.tolist() == pytest.approx([0.2, 1.2, -1.9])
    assert returns.tolist() == pytest.approx([1.2, 3.2, -1.4])


def test_hand_worked_losses():
    """Ratios 1.5 and 0.5 with clip 0.2: A = 2: -min(3, 2.4); A = -1: -min(-0.5, -0.8)."""
    old = torch.zeros(3)
    logprobs = torch.log(torch.tensor([1.5, 0.5, 1.1]))
    losses, ratio = policy_loss(logprobs, old, torch.tensor([2.0, -1.0, 1.0]), 0.2)
    assert ratio.tolist() == pytest.approx([1.5, 0.5, 1.1])
    assert losses.tolist() == pytest.approx([-2.4, 0.8, -1.1])
    # from 0 to 1 moves by 0.2 at most: max((1 - 2)^2, (0.2 - 2)^2) / 2
    critic = value_loss(torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([2.0, 1.0]), 0.2)
    assert critic.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 0.9**2])


def test_clipped_tokens_have_no_gradient_where_they_moved_far_enough():
    logprobs = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5])).requires_grad_()
    losses, _ = policy_loss(logprobs, torch.zeros(4), torch.tensor([1.0, -1.0, -1.0, 1.0]), 0.2)
    losses.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 1.5, -0.5])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_are_the_sum_of_their_definition(gamma, lam):
    """A_t = sum_l (gamma lambda)^l delta_t+l, completion by completion."""
    rng = torch.Generator().manual_seed(3)
    lengths = torch.tensor([4, 1, 7, 2])
    n = int(lengths.sum())
    rewards, values = torch.randn(n, generator=rng), torch.randn(n, generator=rng)
    advantages, returns = advantages_and_returns(rewards, values, lengths, gamma, lam)
    for r, v, a in zip(
        rewards.split(lengths.tolist()),
        values.split(lengths.tolist()),
        advantages.split(lengths.tolist()),
        strict=True,
    ):
        after = [*v[1:].tolist(), 0.0]
        deltas = [float(r[t]) + gamma * after[t] - float(v[t]) for t in range(len(r))]
        for t in range(len(r)):
            wanted = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:]))
            assert float(a[t]) == pytest.approx(wanted, abs=1e-5)
    assert torch.allclose(returns, advantages + values)


def test_with_lambda_and_gamma_1_returns_are_the_rewards_to_come():
    lengths = torch.tensor([3])
    rewards = torch.tensor([1.0, 2.0, 4.0])
    _, returns = advantages_and_returns(rewards, torch.tensor([5.0, 6.0, 7.0]), lengths, 1.0, 1.0)
    assert returns.tolist() == pytest.approx([7.0, 6.0, 4.0])


def test_whitened_values():
    values = whiten(torch.tensor([1.0, 3.0, 5.0]))
    assert values.tolist() == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])
    assert whiten(torch.ones(4)).tolist() == [0.0] * 4


def test_the_kl_weight_is_steered():
    """Twice the target clips to +0.2: 1 + 0.2 * 100 / 1000. Below it: 0.9 - 1 = -0.1."""
    control = AdaptiveKl(0.5, target=6.0, horizon=1000)
    control.update(12.0, 100)
    assert control.coef == pytest.approx(0.5 * 1.02)
    control.update(5.4, 100)
    assert control.coef == pytest.approx(0.5 * 1.02 * 0.99)
    control.update(-1.0, 10**6)
    assert control.coef > 0.0
    fixed = FixedKl(0.5)
    fixed.update(12.0, 100)
    assert fixed.coef == 0.5


def test_scores_are_normalised():
    normaliser = fit_normalizer(torch.tensor([1.0, 5.0]))
    assert normaliser(torch.tensor([1.0, 3.0, 5.0])).tolist() == [-1.0, 0.0, 1.0]
    assert fit_normalizer(torch.ones(3))(torch.tensor([2.0])).tolist() == [1.0]


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns, torch.zeros(3)) == 0.0
    assert explained_variance(torch.ones(3), torch.ones(3)) == 0.0


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_temperature_divides_the_logits_after_soft_capping(softcap):
    torch.manual_seed(0)
    head = Head(torch.randn(7, 5), torch.randn(7), scale=0.5, softcap=softcap)
    if softcap is None:
        head = Head(torch.randn(7, 5), None, scale=0.5)
    hidden = torch.randn(3, 5)
    expected = logits_of(hidden, head) / 0.7
    assert torch.allclose(logits_of(hidden, at_temperature(head, 0.7)), expected, atol=1e-6)
