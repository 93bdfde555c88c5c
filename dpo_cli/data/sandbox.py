"""Jinja's sandbox without operations that cannot be interrupted: chat templates come with models
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
    """Limits the size of numbers: a single operation on long ones takes hours and cannot be
    interrupted. Without a loader, templates cannot include, import or extend others."""

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
