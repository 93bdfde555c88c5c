"""Out of memory: a step is done again in smaller micro-batches, a pass in smaller rows."""

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
    """Most packed tokens of a row, shared by all passes of a run.

    asked: of the configuration and the attention; tokens: what has fitted into memory so far.
    fixed: running out of memory is an error, as where other processes wait for this one.
    """

    asked: int
    fixed: bool = False
    tokens: int = field(init=False)
    at_work: bool = field(init=False, default=False)  # a pass is running whose rows can be smaller
    found: dict[str, int] | None = field(init=False, default=None)  # by an earlier start

    def __post_init__(self) -> None:
        self.tokens = self.asked

    @property
    def lowered(self) -> bool:
        return self.tokens < self.asked

    def mends(self, error: RuntimeError) -> bool:
        """Whether smaller rows may help."""
        return not self.fixed and ran_out(error)

    def refuse_single(self, error: RuntimeError, failed: Batch) -> None:
        """ConfigError where an example alone was too large: no smaller rows will help."""
        if ran_out(error) and len(failed.example_ids) == 1:
            raise too_large(failed.input_ids.numel()) from error

    def limit(self, most: int) -> None:
        """What is asked for is no more than this, whatever memory there is."""
        self.asked, self.tokens = min(self.asked, most), min(self.tokens, most)
        self.restore(self.found)

    def start_with(self, tokens: int) -> None:
        """Fewer than asked, where more are not expected to fit."""
        self.tokens = min(self.tokens, tokens)

    def lower(self, failed: Batch | None, note: Note) -> None:
        """Halve: no row like `failed` again. ConfigError where one example alone is too large."""
        tokens = self.tokens
        if failed is not None:
            tokens = min(tokens, failed.input_ids.numel())
            if len(failed.example_ids) == 1:
                raise too_large(tokens)
        elif tokens == 1:
            raise too_large(None)
        self.tokens = max(1, tokens // 2)
        note(f"out of memory with {tokens:,} tokens at once: from now on at most {self.tokens:,}")

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"asked": self.asked, "tokens": self.tokens}

    def restore(self, state: dict[str, int] | None) -> None:
        """What an earlier start found, unless another budget is asked for since."""
        self.found = state
        if state is not None and state["asked"] == self.asked:
            self.tokens = min(self.tokens, state["tokens"])


def too_large(tokens: int | None) -> ConfigError:
    size = "" if tokens is None else f" of {tokens:,} tokens"
    return ConfigError(
        f"out of memory with a single example{size} in a micro-batch: lower data.max_length, "
        "train fewer weights (lora=lora, lora=qlora), or recompute activations in the backward "
        "(hardware.activation_checkpointing=1)"
    )


@contextmanager
def smaller_next_time(budget: TokenBudget, run_dir: Path) -> Iterator[None]:
    """Where ranks run out of memory, which cannot do a step again: those that wait for the one
    that failed are in the middle of an exchange. Leaves half the budget for the next start.

    Raises OutOfMemory, or ConfigError where smaller rows are impossible.
    """
    try:
        yield
    except RuntimeError as error:
        if not (budget.fixed and budget.at_work and ran_out(error)):
            raise
        tokens = budget.tokens
        if tokens == 1:
            raise too_large(None) from error
        write_json(run_dir / BUDGET, {"asked": budget.asked, "tokens": tokens // 2})
        raise OutOfMemory(
            f"out of memory with {tokens:,} tokens at once: from now on at most {tokens // 2:,}; "
            f"go on with: dpo-run resume={run_dir}", str(run_dir),
        ) from error  # fmt: skip


def read_budget(run_dir: Path) -> dict[str, int] | None:
    """What `smaller_next_time` left."""
    path = run_dir / BUDGET
    if not path.is_file():
        return None
    found: dict[str, int] = json.loads(path.read_text())
    return found


@contextmanager
def explained() -> Iterator[None]:
    """ConfigError for an allocation that fails where nothing can be made smaller."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        (first, *_) = str(error).splitlines()
        raise ConfigError(
            f"{first} Lower train.micro_batch_tokens (stage.batch_size where it samples), train "
            "fewer weights (lora=lora, lora=qlora) or keep less beside them (optim=adamw8bit, "
            "hardware.activation_checkpointing=1)"
        ) from error


def within(budget: TokenBudget, device: torch.device, note: Note, work: Callable[[], T]) -> T:
    """`work()`, a pass that packs its rows by the budget and changes nothing; begun again in
    smaller rows where memory runs out. Such passes start with their longest rows; one may be part
    of another."""
    before = budget.at_work
    while True:
        budget.at_work = True
        try:
            made = work()
            budget.at_work = before
            return made
        except RuntimeError as error:
            if not budget.mends(error):
                raise
        free_memory(device)
        budget.lower(None, note)


@dataclass(frozen=True)
class RandomStates:
    """Of the generators that dropout draws from, so that a step done again draws the same."""

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
