"""The optimum, best-of-N and their errors, against enumeration and numbers worked by hand."""

import itertools
import math

import numpy as np
import pytest

from dpo_cli.evaluation import frontier
from dpo_cli.evaluation.frontier import (
    best_of,
    best_of_kl_bound,
    optimum_curve,
    optimum_reward_at_kl,
    shortfall_error,
    tilt,
)
from toy_space import best_of_probabilities


def test_tilt_by_hand():
    """Two equally likely samples, rewards 0 and log 3 at beta 1: weights 1 and 3."""
    at = tilt(np.array([[0.0, math.log(3)]]), 1.0)
    assert at.reward == pytest.approx([0.75 * math.log(3)])
    assert at.kl == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)])
    assert at.value == pytest.approx([math.log(2)])
    assert at.ess == pytest.approx([16 / 10])


def test_tilt_does_not_overflow():
    at = tilt(np.array([[1e5, 0.0, -1e5], [7.0, 7.0, 7.0]]), 1e-3)
    assert at.reward == pytest.approx([1e5, 7.0])
    assert at.kl == pytest.approx([math.log(3), 0.0], abs=1e-6)
    assert at.ess == pytest.approx([1.0, 3.0])


def discrete(seed: int, prompts: int, outcomes: int) -> tuple[np.ndarray, np.ndarray]:
    """(P, Y) probabilities and rewards of every response of a reference."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (prompts, outcomes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p, rng.normal(rng.normal(0, 0.5, (prompts, 1)), 1.0, (prompts, outcomes))


def enumerated(p: np.ndarray, r: np.ndarray, beta: float) -> tuple[float, float]:
    """(KL, reward) of pi_ref exp(r / beta) / Z, means over prompts, from every response."""
    q = p * np.exp((r - r.max(1, keepdims=True)) / beta)
    q /= q.sum(1, keepdims=True)
    kl = q * np.log(np.where(q > 0, q / p, 1.0))
    return float(kl.sum(1).mean()), float((q * r).sum(1).mean())


def drawn(p: np.ndarray, r: np.ndarray, samples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([
        r[i, rng.choice(p.shape[1], size=samples, p=p[i])] for i in range(len(p))
    ])  # fmt: skip


def test_the_sampled_curve_is_the_enumerated_one():
    p, r = discrete(0, prompts=40, outcomes=60)
    curve = optimum_curve(drawn(p, r, 4000, seed=1))
    exact = [enumerated(p, r, beta) for beta in curve.betas]
    kl, reward = np.array(exact).T
    assert curve.kl[0] < 0.01
    assert curve.kl[-1] > 2.0
    # The errors stated are over prompts, so too large for these very prompts; see below for a
    # tighter bound.
    assert (np.abs(curve.kl - kl) < 4 * curve.kl_se).all()
    assert (np.abs(curve.reward - reward) < 4 * curve.reward_se).all()
    assert np.abs(curve.reward - reward).max() < 0.03
    for target in (0.05, 0.3, 1.0, 1.8):
        expected = np.interp(target, kl, reward)
        assert optimum_reward_at_kl(curve, target).reward == pytest.approx(expected, abs=0.02)
    assert (np.diff(curve.kl) > 0).all()
    assert (np.diff(curve.reward) > 0).all()


def test_the_stated_errors_are_those_of_many_evaluations():
    """Fresh prompts and samples each time: value_se is the spread of R*(KL), bias its offset."""
    kl, estimates, errors, offsets = 0.8, [], [], []
    p, r = discrete(5, prompts=4000, outcomes=40)
    curve = [enumerated(p, r, beta) for beta in np.geomspace(30, 0.05, 200)]
    truth = np.interp(kl, *np.array(curve).T)
    for seed in range(60):
        chosen = np.random.default_rng(seed).choice(4000, size=50, replace=False)
        found = optimum_curve(drawn(p[chosen], r[chosen], 48, seed=100 + seed))
        place = int(np.searchsorted(found.kl, kl))
        estimates.append(optimum_reward_at_kl(found, kl).reward)
        errors.append(found.value_se[place])
        offsets.append(found.bias[place])
    spread = float(np.std(estimates, ddof=1))
    assert spread == pytest.approx(np.mean(errors), rel=0.3)  # its own error is 9%
    offset = float(np.mean(estimates) - truth)
    assert -0.12 < offset < 0  # Jensen: too low
    assert 2.5 * offset < np.mean(offsets) < 0.3 * offset


def test_the_curve_stops_where_few_samples_carry_the_weight():
    rewards = np.random.default_rng(0).normal(size=(30, 64))
    curve = optimum_curve(rewards)
    assert curve.ess[-1] == pytest.approx(frontier.TRUSTED_SAMPLES, rel=1e-3)
    assert curve.ess.min() == curve.ess[-1]
    assert curve.ess_least[-1] <= curve.ess[-1]
    assert curve.kl[-1] < math.log(64)
    longer = optimum_curve(np.random.default_rng(0).normal(size=(30, 1024)))
    assert longer.kl[-1] > curve.kl[-1] + 1.0


def test_beyond_the_curve_the_last_reward_is_a_bound():
    rewards = np.random.default_rng(0).normal(size=(30, 64))
    curve = optimum_curve(rewards)
    beyond = optimum_reward_at_kl(curve, curve.kl[-1] + 1.0)
    assert beyond.beyond
    assert beyond.reward == curve.reward[-1] < rewards.max(1).mean()
    assert math.isnan(shortfall_error(curve, rewards[:, 0], np.full(30, 9.0)))
    inside = optimum_reward_at_kl(curve, float(curve.kl[5]))
    assert not inside.beyond
    assert inside.reward == pytest.approx(curve.reward[5])
    assert optimum_reward_at_kl(curve, 0.0).reward == pytest.approx(rewards.mean())


def test_equal_rewards_and_two_levels():
    flat = optimum_curve(np.full((4, 16), 2.5))
    assert flat.kl.tolist() == [0.0]
    assert flat.reward.tolist() == [2.5]
    half = np.tile([0.0, 1.0], (6, 32))  # the better half is all there is to choose
    curve = optimum_curve(half)
    assert curve.kl[-1] == pytest.approx(math.log(2), abs=1e-3)
    assert curve.reward[-1] == pytest.approx(1.0, abs=1e-3)
    assert curve.ess[-1] == pytest.approx(32, rel=1e-2)


def test_the_scale_and_origin_of_rewards_do_not_matter():
    rewards = np.random.default_rng(2).normal(size=(12, 64))
    small, large = optimum_curve(rewards), optimum_curve(1000 * rewards - 5)
    np.testing.assert_allclose(large.kl, small.kl, rtol=1e-6)
    np.testing.assert_allclose(large.reward, 1000 * small.reward - 5, rtol=1e-6)
    np.testing.assert_allclose(large.betas, 1000 * small.betas, rtol=1e-6)


def test_the_error_of_a_shortfall_is_of_the_same_prompts():
    """Prompts far apart, a policy at a constant distance: hardly any error."""
    p, r = discrete(0, prompts=40, outcomes=60)
    r += np.linspace(-50, 50, 40)[:, None]
    rewards = drawn(p, r, 400, seed=1)
    curve = optimum_curve(rewards)
    at = tilt(rewards, float(curve.betas[20]))
    assert curve.reward_se[20] > 4
    assert shortfall_error(curve, at.reward - 0.3, at.kl) < 1e-6
    noisy = at.reward - 0.3 + np.random.default_rng(0).normal(0, 0.2, 40)
    assert shortfall_error(curve, noisy, at.kl) == pytest.approx(0.2 / math.sqrt(40), rel=0.25)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_is_the_mean_over_all_subsets(n):
    rewards = np.random.default_rng(n).normal(size=(3, 5))
    subsets = [rewards[:, list(chosen)].max(1) for chosen in itertools.combinations(range(5), n)]
    np.testing.assert_allclose(best_of(rewards, n), np.mean(subsets, axis=0), rtol=1e-12)


def test_best_of_many_samples_stays_finite():
    rewards = np.random.default_rng(0).normal(size=(2, 5000))
    assert best_of(rewards, 1) == pytest.approx(rewards.mean(1))
    assert best_of(rewards, 5000) == pytest.approx(rewards.max(1))
    assert (np.diff([best_of(rewards, n).mean() for n in (1, 4, 64, 1024)]) > 0).all()


def test_best_of_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="best of 6 needs at least 6 samples per prompt"):
        best_of(np.zeros((2, 5)), 6)


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_against_enumeration(n, levels):
    """E[max] within 4 standard errors; the true KL below log n - (n - 1)/n."""
    p, r = discrete(7, prompts=1, outcomes=80)
    p, r = p[0], np.round(r[0] * levels) / levels if levels > 3 else np.sign(np.round(r[0]))
    q = best_of_probabilities(p, r, n)
    assert q.sum() == pytest.approx(1.0)
    samples = np.random.default_rng(n).choice(r, size=(400, 64), p=p)
    estimates = best_of(samples, n)
    error = frontier.standard_error(estimates)
    assert estimates.mean() == pytest.approx(float(q @ r), abs=4 * error)
    assert error < 0.06
    kept = q > 0
    kl = float((q[kept] * np.log(q[kept] / p[kept])).sum())
    assert kl <= best_of_kl_bound(n) + 1e-12
    if n == 1:
        assert kl == pytest.approx(0.0, abs=1e-12)
    elif levels > 3:
        assert kl > 0.5 * best_of_kl_bound(n)


def test_best_of_kl_bound_by_hand():
    assert best_of_kl_bound(1) == 0.0
    assert best_of_kl_bound(4) == pytest.approx(math.log(4) - 0.75)
