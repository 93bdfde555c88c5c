"""Jinja's sandbox without operations that cannot be interrupted: a chat template comes with a model
and may be hostile."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.filters import do_round
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST_EXPONENT = 64
MOST_BITS = 4096  # of a whole number that is computed with
MOST_DIGITS = 64  # to round to


class Sandbox(ImmutableSandboxedEnvironment):
    """Small numbers only: one operation on long ones takes hours, in which no signal is heard.
    Without a loader, templates include, import and extend nothing."""

    intercepted_binops = frozenset({"*", "**", "/", "//", "%"})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.filters["round"] = _round

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if any(value.bit_length() > MOST_BITS for value in numbers):
            raise SecurityError(f"{operator} with a number of over {MOST_BITS} bits")
        if operator == "**" and abs(right) > LARGEST_EXPONENT:
            raise SecurityError(f"** with an exponent over {LARGEST_EXPONENT}")
        return super().call_binop(context, operator, left, right)


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    if abs(precision) > MOST_DIGITS:
        raise SecurityError(f"round to over {MOST_DIGITS} digits")
    return do_round(value, precision, method)
