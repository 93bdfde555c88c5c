"""The best reward that any policy can reach at a given KL to the reference, from its samples.

The policy that maximizes E[r] - beta KL(pi || pi_ref) is (arXiv 2305.18290 eq. 4)

    pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)

and with w = exp(r / beta) for N samples of the reference, for each prompt,

    E*[r] = sum(w r) / sum(w)          KL* = E*[r] / beta - log mean(w).

Both are means over prompts at one common beta: a policy is measured by its means over prompts,
and the Lagrange multiplier of the mean KL is the same for all of them.

Accuracy: prompts are independent, so the standard error over prompts includes the sampling noise
within them. It does not include bias: log mean(w) is too small on average (Jensen), so the curve
lies below the true one, most where few samples carry the weight; KL* cannot exceed log N. Their
number is the effective sample size (sum w)^2 / sum w^2. The curve ends where its mean over prompts
falls to `TRUSTED_SAMPLES`; for normal and for saturating rewards the bias there was .02 to .03 of
the rewards' standard deviation.

Shapes: P prompts, N samples of each, B betas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TRUSTED_SAMPLES = 10.0  # minimum mean effective sample size
PER_DECADE = 12  # betas
WIDEST, NARROWEST = 30.0, 1e-3  # betas of the curve, in standard deviations of the rewards


@dataclass(frozen=True)
class Tilted:
    """The reference reweighted by exp(r / beta) at one beta, each (P,).

    value: beta log mean(w), the maximum of E[r] - beta KL. ess: effective sample size.
    """

    reward: np.ndarray
    kl: np.ndarray
    value: np.ndarray
    ess: np.ndarray


def tilt(rewards: np.ndarray, beta: float) -> Tilted:
    """rewards: (P, N) of samples of the reference; beta > 0."""
    scaled = rewards / beta
    top = scaled.max(1, keepdims=True)
    w = np.exp(scaled - top)
    total = w.sum(1)
    reward = (w * rewards).sum(1) / total
    log_mean = np.log(total / rewards.shape[1]) + top[:, 0]
    kl = np.maximum(reward / beta - log_mean, 0.0)  # rounding at large beta
    return Tilted(reward, kl, beta * log_mean, total**2 / (w**2).sum(1))


@dataclass(frozen=True)
class Curve:
    """The optimum over betas, from large to small: KL and reward rise along it.

    betas, kl, kl_se, reward, reward_se, ess (mean over prompts), ess_least (minimum): (B,).
    values: (B, P), `Tilted.value` of each prompt. R*(KL) = min over beta of beta KL + mean
    value, so their standard error, `value_se` (B,), is that of the reward at a given KL.
    bias: (B,), of that reward, estimated from halves of the samples: never positive, and
    underestimated where it is large.
    reference_reward: mean reward of the reference, the curve's start at KL 0.
    """

    betas: np.ndarray
    kl: np.ndarray
    kl_se: np.ndarray
    reward: np.ndarray
    reward_se: np.ndarray
    ess: np.ndarray
    ess_least: np.ndarray
    values: np.ndarray
    bias: np.ndarray
    reference_reward: float

    @property
    def value_se(self) -> np.ndarray:
        return np.array([standard_error(row) for row in self.values])


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; NaN for a single one."""
    n = len(values)
    return float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def optimum_curve(rewards: np.ndarray, floor: float = TRUSTED_SAMPLES) -> Curve:
    """The curve from a KL of about 0 to where the mean effective sample size is `floor`.

    rewards: (P, N), N >= 2, finite. If all rewards are equal, the curve is one point at KL 0; with
    `floor` above N, only the largest beta.
    """
    betas = trusted_betas(rewards, floor)
    rows = [tilt(rewards, beta) for beta in betas]
    return Curve(
        betas=np.array(betas),
        kl=np.array([row.kl.mean() for row in rows]),
        kl_se=np.array([standard_error(row.kl) for row in rows]),
        reward=np.array([row.reward.mean() for row in rows]),
        reward_se=np.array([standard_error(row.reward) for row in rows]),
        ess=np.array([row.ess.mean() for row in rows]),
        ess_least=np.array([row.ess.min() for row in rows]),
        values=np.array([row.value for row in rows]),
        bias=np.array([_bias(rewards, row, beta) for row, beta in zip(rows, betas, strict=True)]),
        reference_reward=float(rewards.mean()),
    )


def _bias(rewards: np.ndarray, full: Tilted, beta: float) -> float:
    """The bias is proportional to 1/N: twice as large on halves, so the difference estimates it."""
    half = rewards.shape[1] // 2
    halves = (rewards[:, :half], rewards[:, half : 2 * half])
    values = [tilt(part, beta).value.mean() for part in halves]
    return float(np.mean(values) - full.value.mean())


def trusted_betas(rewards: np.ndarray, floor: float) -> list[float]:
    """A log grid from large to small, down to where the effective sample size is `floor`.

    It ends earlier if the KL no longer grows, as only the best samples have weight.
    """
    spread = float(np.std(rewards - rewards.mean(1, keepdims=True)))
    if spread <= 1e-12 * max(1.0, float(np.abs(rewards).max())):
        return [1.0]

    def facts(beta: float) -> tuple[bool, float]:
        tilted = tilt(rewards, beta)
        return float(tilted.ess.mean()) >= floor, float(tilted.kl.mean())

    steps = round(PER_DECADE * math.log10(WIDEST / NARROWEST))
    grid = [float(b) for b in spread * np.geomspace(WIDEST, NARROWEST, steps + 1)]
    betas = grid[:1]
    trusted, largest_kl = facts(grid[0])
    for beta in grid[1:] if trusted else ():
        trusted, kl = facts(beta)
        if not trusted:
            betas.append(_crossing(betas[-1], beta, lambda b: facts(b)[0]))
            break
        if kl < largest_kl * (1 + 1e-4):
            break
        betas.append(beta)
        largest_kl = kl
    return betas


def _crossing(high: float, low: float, trusted: Callable[[float], bool]) -> float:
    """The smallest trusted beta between a trusted and an untrusted one."""
    for _ in range(20):
        middle = math.sqrt(high * low)
        high, low = (middle, low) if trusted(middle) else (high, middle)
    return high


@dataclass(frozen=True)
class AtKl:
    """The optimum at a given KL. beyond: the KL exceeds the curve's last, whose `reward` is then a
    lower bound, as the optimum never decreases with the KL. (The largest reward among the samples
    is not an upper bound: it may not be attainable at that KL.)"""

    reward: float
    beyond: bool


def optimum_reward_at_kl(curve: Curve, kl: float) -> AtKl:
    """Monotone interpolation, linear in sqrt(KL), in which the curve starts linearly."""
    nodes = np.sqrt(np.concatenate([[0.0], curve.kl]))
    rewards = np.concatenate([[curve.reference_reward], curve.reward])
    at = math.sqrt(max(kl, 0.0))
    return AtKl(float(np.interp(at, nodes, rewards)), bool(at > nodes[-1]))


def shortfall_error(curve: Curve, rewards: np.ndarray, kls: np.ndarray) -> float:
    """Standard error of optimum_reward_at_kl(mean KL) - mean reward, on the same prompts.

    rewards, kls: (P,) of a policy, prompts in the curve's order. The shortfall is the mean of
    value_p + beta KL_p - r_p at the beta of the policy's KL, so differences in difficulty between
    prompts cancel. NaN beyond the curve.
    """
    at = math.sqrt(max(float(kls.mean()), 0.0))
    nodes = np.sqrt(curve.kl)
    if at > nodes[-1]:
        return math.nan
    right = min(int(np.searchsorted(nodes, at)), len(nodes) - 1)
    left = max(right - 1, 0)
    width = nodes[right] - nodes[left]
    share = float(np.clip((at - nodes[left]) / width, 0.0, 1.0)) if width > 0 else 1.0
    beta = (1 - share) * curve.betas[left] + share * curve.betas[right]
    values = (1 - share) * curve.values[left] + share * curve.values[right]
    return standard_error(values + beta * kls - rewards)


def best_of(rewards: np.ndarray, n: int) -> np.ndarray:
    """(P, N) -> (P,) unbiased estimates of E[max of n samples].

    The mean of the maximum over all subsets of n: sum_i r_(i) C(i-1, n-1) / C(N, n) over the
    order statistics r_(1) <= ... <= r_(N), the binomials as logarithms. Raises ValueError if n > N.
    """
    samples = rewards.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"best of {n} needs at least {n} samples per prompt, not {samples}")
    ranks = range(n, samples + 1)  # the maximum of n cannot rank lower
    logs = [_log_binomial(i - 1, n - 1) - _log_binomial(samples, n) for i in ranks]
    weights = np.exp(logs)
    ordered: np.ndarray = np.sort(rewards, axis=1)[:, n - 1 :]
    return ordered @ (weights / weights.sum())


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def best_of_kl_bound(n: int) -> float:
    """log n - (n - 1) / n, an upper bound of the KL of best-of-n to the reference (arXiv
    2401.01879); exact if no two samples have the same reward and none is likely."""
    return math.log(n) - (n - 1) / n
