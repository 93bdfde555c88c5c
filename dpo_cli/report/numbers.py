"""Format numbers and names of metrics for the console, pages, cards and plots.

Figures of one metric have the same decimals, so that a column lines up; shares are percentages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeGuard

NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
NATS = "nats"
PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
BOUNDS = ("low", "high")  # of a 95% interval

LABELS = {
    "reward": "Reward",
    "score": "Score",
    "kl": "KL to the reference",
    "kl_sampled": "KL to the reference, by sampled tokens",
    "accuracy": "Preference accuracy",
    "likelihood_accuracy": "Preference accuracy by likelihood",
    "win_rate": "Win rate",
    "optimum_reward_at_kl": "Reward of the optimum at that KL",
    "shortfall": "Gap to the optimum",
    "rewards/accuracies": "Preference accuracy",
    "rewards/margins": "Reward margin",
    "rewards/chosen": "Reward of chosen responses",
    "rewards/rejected": "Reward of rejected responses",
    "loss": "Loss",
    "objective": "Objective (KL penalty minus score)",
    "ece": "Expected calibration error",
    "perplexity": "Perplexity",
    "nll_per_token": "Negative log-likelihood per token",
    "logps/chosen": "Log-probability of chosen responses",
    "logps/rejected": "Log-probability of rejected responses",
    "logps/accuracies": "Chosen more likely than rejected",
    "gradient_weight": "Gradient weight",
    "logratios/chosen": "Log-ratio of chosen responses",
    "logratios/chosen_fell": "Chosen less likely than under the reference",
    "rewards/length_correlation": "Correlation of margin and length",
    "logratios/rejected": "Log-ratio of rejected responses",
    "tokens": "Tokens per completion",
    "finished": "Completions finished with EOS",
    "rollout/tied": "Pairs without a preference",
    "rollout/score_gap": "Score of chosen minus rejected completions",
    "distinct_2": "Distinct bigrams",
    "pairs": "Pairs",
    "trained_share": "Share of prompts seen in training",
    "eval_rows_trained_on": "Held-out rows seen in training",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "step_seconds": "Seconds per step",
    "tokens_per_second": "Tokens per second",
    "pairs_per_second": "Pairs per second",
    "examples_per_second": "Examples per second",
    "tflops_per_second": "TFLOP/s",
    "mfu": "Model FLOPs utilization",
    "peak_memory_mb": "Peak memory (MB)",
    "micro_batch_tokens": "Tokens per micro-batch",
}
_SHARES = (
    "accuracies", "accuracy", "chosen_fell", "likelihood_accuracy", "trained_share", "finished",
    "ece", "win_rate", "low", "high", "distinct_2", "mfu", "tied", "decided",
)  # fmt: skip
_SETTINGS = ("temperature", "setting")  # shown as written: they are chosen, not measured
_NATS = ("kl", "kl_sampled", "nll_per_token", "logps", "logratios")


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def label(metric: str) -> str:
    """`eval/loss` -> Held-out loss; a name without a label is returned unchanged."""
    if metric.startswith("first/"):
        return f"{label(metric.removeprefix('first/'))}, before"
    base = metric.removeprefix("eval/")
    for bound in BOUNDS:
        if base.endswith(f"_{bound}") and base.removesuffix(f"_{bound}") in LABELS:
            return f"{label(metric.removesuffix(f'_{bound}'))}, {bound}"
    if base.startswith("win_rate_t"):
        temperature, _, bound = base.removeprefix("win_rate_t").partition("_")
        return f"Win rate at temperature {temperature}{bound and f', {bound}'}"
    if base not in LABELS:
        return metric
    words = LABELS[base]
    words += f" ({NATS})" if _unit(base) == NATS else ""
    return words if base == metric else f"Held-out {lower(words)}"


def label_of(metric: str, row: Mapping[str, Any]) -> str:
    """`label`; in a run that scores samples, the held-out loss is the objective of reward and KL,
    which must not be compared with the training loss."""
    objective = metric.endswith("eval/loss") and "eval/score" in row
    return label(metric.replace("loss", "objective") if objective else metric)


def lower(words: str) -> str:
    """First letter in lower case, for the middle of a sentence; KL stays KL."""
    return words if words[:2].isupper() else words[:1].lower() + words[1:]


def _unit(metric: str) -> str:
    base = metric.removeprefix("first/").removeprefix("eval/")
    for bound in BOUNDS:
        base = base.removesuffix(f"_{bound}")
    if base.rpartition("/")[2] in _SHARES or base.startswith("win_rate"):
        return "%"
    return NATS if base in _NATS or base.partition("/")[0] in _NATS else ""


def figures(metric: str, values: Sequence[Any], errors: Sequence[Any] = ()) -> list[str]:
    """Values of one metric with the same number of decimals, `± error` where one is known.

    The largest value has four digits; shares are percentages; None and NaN are a dash, other
    values are shown as text.
    """
    scale, sign = (100.0, "%") if _unit(metric) == "%" else (1.0, "")
    numbers = [v for v in values if is_number(v)]
    form = _form([v * scale for v in numbers], bool(sign))
    if metric in _SETTINGS:
        form = "g"
    elif not sign and all(isinstance(v, int) for v in numbers):
        form = ",d"
    shown = []
    for index, value in enumerate(values):
        if not is_number(value):
            shown.append(NOTHING if value is None or isinstance(value, float) else str(value))
            continue
        text = _formatted(value if form == ",d" else value * scale, form)
        error = errors[index] if index < len(errors) else None
        if is_number(error) and form != ",d":
            text += f"{PLUS_MINUS}{_formatted(error * scale, form)}"
        shown.append(text.replace("e-0", "e-").replace("-", MINUS) + sign)
    return shown


def _formatted(value: float, form: str) -> str:
    return "0" if value == 0 and form == ".2e" else format(value, form)


def _form(values: Sequence[float], percent: bool) -> str:
    """The format specification in which the largest of the values has four digits."""
    largest = max((abs(v) for v in values), default=0.0)
    if percent:
        return ".1f"
    if 0.0 < largest < 1e-3:
        return ".2e"
    digits = 3 - math.floor(math.log10(largest)) if largest else 0
    return f",.{min(max(digits, 0), 3 if largest >= 0.01 else 4)}f"


def figure(metric: str, value: Any, error: Any = None) -> str:
    """One value of a metric, such as `0.762 ± 0.015` or `73.1%`."""
    return figures(metric, [value], [error])[0]


def with_unit(metric: str, value: Any, error: Any = None) -> str:
    """One value with its unit, for running text."""
    unit = f" {NATS}" if _unit(metric) == NATS else ""
    return figure(metric, value, error) + unit


def count(number: int, singular: str, plural: str | None = None) -> str:
    """1,024 pairs; 1 pair."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def interval(metric: str, row: Mapping[str, Any]) -> str:
    """`57.1% to 69.0%`, from `<metric>_low` and `<metric>_high`; "" if one is missing."""
    low, high = (row.get(f"{metric}_{bound}") for bound in BOUNDS)
    known = is_number(low) and is_number(high)
    return f"{figure(metric, low)} to {figure(metric, high)}" if known else ""


def before(metric: str, row: Mapping[str, Any]) -> str:
    """`50.0% before`, from `first/<metric>`; "" if it is missing."""
    first = row.get(f"first/{metric}")
    return f"{figure(metric, first)} before" if is_number(first) else ""


def bracketed(text: str) -> str:
    """` (text)`; "" for ""."""
    return f" ({text})" if text else ""


def brief(value: Any) -> str:
    """A number to four digits, with thousands separators; "-" for None; other values as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def nats(kl: float) -> str:
    """Three digits: 0.03, 4.51, 10.9, 180."""
    return f"{kl:.{2 if kl < 10 else 1 if kl < 100 else 0}f}"


def with_error(value: float, error: float = math.nan) -> str:
    """`0.905±0.012`, short enough for a wide table on a console."""
    digits = 3 if abs(value) < 10 else 1
    return f"{value:.{digits}f}" + (f"±{error:.{digits}f}" if math.isfinite(error) else "")


def short_number(value: float) -> str:
    """A tick label: 1500 -> 1.5k, 2e-06 -> 2e-6."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    else:
        sizes = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
        size, letter = next((pair for pair in sizes if abs(value) >= pair[0]), (1, ""))
        text = f"{value / size:.4g}{letter}"
    return text.replace("-", MINUS)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def duration(seconds: float) -> str:
    """`0:01:30`."""
    return str(timedelta(seconds=round(seconds)))
