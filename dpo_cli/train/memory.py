"""Out of memory: the token budget is halved, and the step or pass is retried."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from dpo_cli.device_memory import free_memory, ran_out
from dpo_cli.durable import write_json
from dpo_cli.errors import ConfigError, OutOfMemory
from dpo_cli.records import Batch

T = TypeVar("T")
Note = Callable[[str], None]

BUDGET = "micro_batch_tokens.json"  # in the run folder


@dataclass
class TokenBudget:
    """The maximum of tokens per packed row, shared by all passes of a run.

    configured: the maximum by configuration and attention; tokens: what has fit into memory so far.
    fixed: out of memory is an error, as with several ranks, where the others would wait.
    """

    configured: int
    fixed: bool = False
    tokens: int = field(init=False)
    in_use: bool = field(init=False, default=False)  # a pass that packs by the budget is running
    saved: dict[str, int] | None = field(init=False, default=None)  # state of an earlier start

    def __post_init__(self) -> None:
        self.tokens = self.configured

    @property
    def lowered(self) -> bool:
        return self.tokens < self.configured

    def can_retry(self, error: RuntimeError) -> bool:
        """Whether to retry with smaller rows."""
        return not self.fixed and ran_out(error)

    def refuse_single(self, error: RuntimeError, failed: Batch) -> None:
        """ConfigError if a single example was too large for memory."""
        if ran_out(error) and len(failed.example_ids) == 1:
            raise too_large(failed.input_ids.numel()) from error

    def limit(self, most: int) -> None:
        """Lower the configured limit to `most`, independent of memory."""
        self.configured, self.tokens = min(self.configured, most), min(self.tokens, most)
        self.restore(self.saved)

    def start_with(self, tokens: int) -> None:
        """Start below the configured limit, as more is not expected to fit."""
        self.tokens = min(self.tokens, tokens)

    def lower(self, failed: Batch | None, note: Note) -> None:
        """Halve the budget to below `failed`'s size. ConfigError if that is a single example."""
        tokens = self.tokens
        if failed is not None:
            tokens = min(tokens, failed.input_ids.numel())
            if len(failed.example_ids) == 1:
                raise too_large(tokens)
        elif tokens == 1:
            raise too_large(None)
        self.tokens = max(1, tokens // 2)
        note(f"out of memory with {tokens:,} tokens per row: lowered to {self.tokens:,}")

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"asked": self.configured, "tokens": self.tokens}

    def restore(self, state: dict[str, int] | None) -> None:
        """Take over an earlier start's budget, unless another limit is configured now."""
        self.saved = state
        if state is not None and state["asked"] == self.configured:
            self.tokens = min(self.tokens, state["tokens"])


def too_large(tokens: int | None) -> ConfigError:
    size = "" if tokens is None else f" of {tokens:,} tokens"
    return ConfigError(
        f"out of memory with a single example{size} in a micro-batch: lower data.max_length, "
        "train fewer weights (lora=lora, lora=qlora), or use activation checkpointing "
        "(hardware.activation_checkpointing=1)"
    )


@contextmanager
def halve_budget_for_restart(budget: TokenBudget, run_dir: Path) -> Iterator[None]:
    """Halve the budget in the run folder if a rank runs out of memory. Ranks cannot retry a step:
    the others are waiting in a collective, so the launcher restarts them.

    Raises OutOfMemory, or ConfigError if rows cannot be smaller.
    """
    try:
        yield
    except RuntimeError as error:
        if not (budget.fixed and budget.in_use and ran_out(error)):
            raise
        tokens = budget.tokens
        if tokens == 1:
            raise too_large(None) from error
        write_json(run_dir / BUDGET, {"asked": budget.configured, "tokens": tokens // 2})
        raise OutOfMemory(
            f"out of memory with {tokens:,} tokens per row: lowered to {tokens // 2:,}; "
            f"continue with: dpo-run resume={run_dir}", str(run_dir),
        ) from error  # fmt: skip


def read_budget(run_dir: Path) -> dict[str, int] | None:
    """The budget written by `halve_budget_for_restart`, if any."""
    path = run_dir / BUDGET
    if not path.is_file():
        return None
    state: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    return state


@contextmanager
def as_oom_error() -> Iterator[None]:
    """Turn a failed allocation that no smaller batch can avoid into a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        (first, *_) = str(error).splitlines()
        raise ConfigError(
            f"{first} Lower train.micro_batch_tokens (stage.batch_size when sampling), train fewer "
            "weights (lora=lora, lora=qlora), or save memory with optim=adamw8bit or "
            "hardware.activation_checkpointing=1"
        ) from error


def within(budget: TokenBudget, device: torch.device, note: Note, work: Callable[[], T]) -> T:
    """Run `work()`, a pass without side effects that packs rows by the budget; restart it with a
    halved budget if memory runs out. Passes start with their longest rows, and may be nested."""
    before = budget.in_use
    while True:
        budget.in_use = True
        try:
            result = work()
            budget.in_use = before
            return result
        except RuntimeError as error:
            if not budget.can_retry(error):
                raise
        free_memory(device)
        budget.lower(None, note)


@dataclass(frozen=True)
class RandomStates:
    """States of the generators that dropout uses, so that a retried step draws the same."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RandomStates:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
