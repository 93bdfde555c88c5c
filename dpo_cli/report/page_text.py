"""Words and numbers of a report: names of metrics, figures that line up, texts cut to size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

MOST_CHARACTERS = 600  # of a prompt or a completion
NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
NATS = "nats"
PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"

LABELS = {
    "reward": "Reward",
    "score": "Score",
    "kl": "KL to the reference",
    "kl_sampled": "KL to the reference, by sampled tokens",
    "accuracy": "Preference accuracy",
    "likelihood_accuracy": "Preference accuracy by likelihood",
    "win_rate": "Win rate",
    "optimum_reward_at_kl": "Reward of the optimum at that KL",
    "shortfall": "Short of the optimum by",
    "rewards/accuracies": "Preference accuracy",
    "rewards/margins": "Reward margin",
    "rewards/chosen": "Reward of chosen responses",
    "rewards/rejected": "Reward of rejected responses",
    "loss": "Loss",
    "ece": "Expected calibration error",
    "perplexity": "Perplexity",
    "nll_per_token": "Negative log-likelihood a token",
    "logps/chosen": "Log-probability of chosen responses",
    "logps/rejected": "Log-probability of rejected responses",
    "logratios/chosen": "Log-ratio of chosen responses",
    "logratios/rejected": "Log-ratio of rejected responses",
    "tokens": "Tokens a completion",
    "finished": "Completions that end by themselves",
    "distinct_2": "Distinct bigrams",
    "pairs": "Pairs",
    "trained_share": "Share of the prompts that was trained on",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "step_seconds": "Seconds a step",
    "tokens_per_second": "Tokens a second",
    "pairs_per_second": "Pairs a second",
    "examples_per_second": "Examples a second",
    "tflops_per_second": "TFLOP a second",
    "mfu": "Model FLOPs utilisation",
    "peak_memory_mb": "Peak memory (MB)",
    "micro_batch_tokens": "Tokens a micro-batch",
}
_SHARES = (
    "accuracies",
    "accuracy",
    "likelihood_accuracy",
    "trained_share",
    "finished",
    "ece",
    "win_rate",
    "low",
    "high",
    "distinct_2",
    "mfu",
)
_SETTINGS = ("temperature", "setting")  # as written, no measured figures
_NATS = ("kl", "kl_sampled", "nll_per_token", "logps", "logratios")


@dataclass(frozen=True)
class Text:
    """A text of somebody else's, cut to size. length: of the whole, in characters."""

    shown: str
    length: int

    @property
    def cut(self) -> bool:
        return len(self.shown) < self.length


def text(value: Any, most: int = MOST_CHARACTERS) -> Text:
    """The first `most` characters; line ends as `\\n`, no space around it."""
    whole = value if isinstance(value, str) else "" if value is None else str(value)
    whole = whole.replace("\r\n", "\n").strip()
    return Text(whole if len(whole) <= most else whole[:most].rstrip(), len(whole))


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


BOUNDS = ("low", "high")  # of a 95% interval


def label(metric: str) -> str:
    """`eval/loss` -> Held-out loss; a name without a label stays as it is."""
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


def lower(words: str) -> str:
    """For the middle of a sentence; KL stays KL."""
    return words if words[:2].isupper() else words[:1].lower() + words[1:]


def _unit(metric: str) -> str:
    base = metric.removeprefix("first/").removeprefix("eval/")
    for bound in BOUNDS:
        base = base.removesuffix(f"_{bound}")
    if base.rpartition("/")[2] in _SHARES or base.startswith("win_rate"):
        return "%"
    return NATS if base in _NATS or base.partition("/")[0] in _NATS else ""


def figures(metric: str, values: Sequence[Any], errors: Sequence[Any] = ()) -> list[str]:
    """Values of one metric with the same decimals; with its standard error where there is one.

    The largest value has four digits; shares are percentages; what is no number is a dash.
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
        one = _formatted(value if form == ",d" else value * scale, form)
        error = errors[index] if index < len(errors) else None
        if is_number(error) and form != ",d":
            one += f"{PLUS_MINUS}{_formatted(error * scale, form)}"
        shown.append(one.replace("e-0", "e-").replace("-", MINUS) + sign)
    return shown


def _formatted(value: float, form: str) -> str:
    return "0" if value == 0 and form == ".2e" else format(value, form)


def _form(values: Sequence[float], percent: bool) -> str:
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
    """The same with its unit, for running text."""
    unit = f" {NATS}" if _unit(metric) == NATS else ""
    return figure(metric, value, error) + unit


def count(number: int, singular: str, plural: str | None = None) -> str:
    """1,024 pairs; 1 pair."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
