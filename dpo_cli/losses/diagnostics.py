"""Side effects of preference training: displacement, length, likelihood.

Each figure is one number per example, (E,), whose mean is logged; docs/losses.md says what to do
when one changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dpo_cli.losses import RankedLogprobs, preferences

DISPLACED = -10.0  # nats: the mean log-ratio of held-out chosen responses that is warned of
CORRELATION = "rewards/length_correlation"
_MOMENTS = tuple(f"moments/{name}" for name in ("x", "y", "xx", "yy", "xy"))


@torch.no_grad()
def diagnostics(logprobs: RankedLogprobs, beta: float) -> Iterator[tuple[str, Tensor]]:
    """Figures of the best compared with the last response of each list.

    logps/accuracies: the policy itself prefers the chosen response, without the reference.
    gradient_weight: sigmoid(-beta h), the weight of DPO's gradient (arXiv 2305.18290 section 4).
    logratios/chosen_fell: the chosen response is less likely than under the reference.
    """
    policy = logprobs.policy.detach()
    sizes = policy.abs()
    yield (
        "logps/accuracies",
        preferences(policy[:, 0] - policy[:, -1], sizes[:, 0] + sizes[:, -1]),
    )
    if logprobs.reference is not None:
        rho = logprobs.logratios.detach()
        yield "gradient_weight", (-beta * (rho[:, 0] - rho[:, -1])).sigmoid()
        rose = preferences(rho[:, 0], sizes[:, 0] + logprobs.reference[:, 0].abs())
        yield "logratios/chosen_fell", 1.0 - rose


@torch.no_grad()
def moments(logprobs: RankedLogprobs) -> Iterator[tuple[str, Tensor]]:
    """Moments of the margin, x, and the difference in tokens, y, for `with_correlation`."""
    rho, lengths = logprobs.logratios.detach(), logprobs.lengths
    x, y = rho[:, 0] - rho[:, -1], lengths[:, 0] - lengths[:, -1]
    yield from zip(_MOMENTS, (x, y, x * x, y * y, x * y), strict=True)


def with_correlation(figures: Mapping[str, float]) -> dict[str, float]:
    """Mean figures with Pearson's correlation of margin and length instead of the moments; without
    it if one of the two is constant."""
    x, y, xx, yy, xy = (figures[name] for name in _MOMENTS)
    result = {name: value for name, value in figures.items() if name not in _MOMENTS}
    spread = (xx - x * x) * (yy - y * y)
    # A variance that is only float32 rounding counts as zero.
    if spread > (1e-6 * max(xx, 1e-12)) * (1e-6 * max(yy, 1e-12)):
        result[CORRELATION] = (xy - x * y) / math.sqrt(spread)
    return result


def warning(figures: Mapping[str, float]) -> str | None:
    """A warning if held-out chosen responses became much less likely."""
    fallen = figures.get("logratios/chosen")
    if fallen is None or fallen > DISPLACED:
        return None
    return (
        f"held-out chosen responses are {-fallen:.0f} nats less likely than under the reference: "
        "stage.nll_weight=0.2, stage.loss=dpop, a higher stage.beta or a lower optim.lr keep them"
    )
