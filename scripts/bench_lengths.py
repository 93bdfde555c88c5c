"""How long synthetic pairs are: log-normal distributions after preference datasets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LENGTHS = ("hh", "tldr", "ultrafeedback")


@dataclass(frozen=True)
class Lengths:
    """Of prompt, chosen (with EOS) and rejected (with EOS), in tokens.

    name: in a label. log_mean, log_sd, correlation: of the logarithms; shortest, longest: of
    each. kept: tokens of prompt and response that training keeps, half of them for the prompt.
    """

    name: str
    log_mean: tuple[float, float, float]
    log_sd: tuple[float, float, float]
    correlation: tuple[tuple[float, ...], ...]
    shortest: tuple[int, int, int]
    longest: tuple[int, int, int]
    kept: int


KNOWN = {
    # Fitted to the 2,312 pairs of Anthropic HH harmless-base/test in GPT-2's tokens.
    "hh": Lengths(
        "HH", (4.381, 3.370, 3.561), (1.001, 0.874, 0.926),
        ((1.0, 0.234, 0.226), (0.234, 1.0, 0.300), (0.226, 0.300, 1.0)),
        (13, 3, 3), (1 << 20,) * 3, 512,
    ),
    # Assumed, not fitted: Reddit posts of at most 512 tokens, about 350 on average, and
    # summaries of about 35, the two of a pair alike in length.
    "tldr": Lengths(
        "TL;DR (assumed)", (5.85, 3.50, 3.50), (0.40, 0.35, 0.35),
        ((1.0, 0.2, 0.2), (0.2, 1.0, 0.4), (0.2, 0.4, 1.0)),
        (40, 8, 8), (512, 64, 64), 1024,
    ),
    # Assumed, not fitted: instructions of about 180 tokens on average with half below 100, and
    # answers of several models of about 350, the longest far above.
    "ultrafeedback": Lengths(
        "UltraFeedback (assumed)", (4.60, 5.60, 5.50), (1.10, 0.75, 0.85),
        ((1.0, 0.2, 0.2), (0.2, 1.0, 0.5), (0.2, 0.5, 1.0)),
        (8, 8, 8), (1 << 20,) * 3, 1024,
    ),
}  # fmt: skip


def draw(name: str, count: int, rng: Any) -> Any:
    """(count, 3) tokens of prompt, chosen and rejected."""
    import numpy as np

    known = KNOWN[name]
    normal = rng.multivariate_normal(np.zeros(3), np.array(known.correlation), count)
    drawn = np.exp(normal * known.log_sd + known.log_mean).round().astype(int)
    return np.clip(drawn, known.shortest, known.longest)
