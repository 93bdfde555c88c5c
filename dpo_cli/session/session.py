"""The session that every stage gets: the run's configuration, devices, sinks and budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedTokenizerFast

from dpo_cli.config import RunConfig
from dpo_cli.data.chat import is_chat
from dpo_cli.data.dataset import EncodedSplits, load_encoded
from dpo_cli.distributed.ranks import Ranks
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.sampling.sampled import DecodingLimit
from dpo_cli.report.console import Progress
from dpo_cli.report.sinks import Sink
from dpo_cli.train.checkpoint import Snapshot
from dpo_cli.train.memory import TokenBudget, read_budget, within
from dpo_cli.train.runtime import Runtime

T = TypeVar("T")


class Chosen(Protocol):
    """Tokens per micro-batch; `str()` gives the reason."""

    @property
    def tokens(self) -> int: ...


@dataclass
class Session:
    """One run: its configuration, run folder, devices and sinks."""

    config: RunConfig
    run_dir: Path
    runtime: Runtime
    progress: Progress
    sinks: list[Sink]
    snapshot: Snapshot | None = None
    # Chooses the tokens per micro-batch by the rows and the free memory; None: as configured
    choose_tokens: Callable[[PreTrainedTokenizerFast, EncodedSplits], Chosen] | None = None
    data_facts: dict[str, Any] = field(default_factory=dict)  # for the model card
    budget: TokenBudget = field(init=False)
    decoding: DecodingLimit = field(init=False, default_factory=DecodingLimit)
    # Lengths at which the rotary factors of its models change, see model/rope.py
    cuts: tuple[int, ...] = field(init=False, default=())
    kernel: str = field(init=False, repr=False)  # of the trained model, set when it is loaded

    def __post_init__(self) -> None:
        configured = self.config.train.micro_batch_tokens
        tokens = self.runtime.micro_batch_tokens(configured)
        self.budget = TokenBudget(tokens, fixed=self.ranks.size > 1)
        self.budget.restore(read_budget(Path(self.config.run_dir)))

    @property
    def ranks(self) -> Ranks:
        return self.runtime.ranks

    @property
    def token_budget(self) -> int:
        """Current maximum number of tokens per pack."""
        return self.budget.tokens

    def within_memory(self, work: Callable[[], T]) -> T:
        """`work()`, a pass without side effects, repeated with smaller packs if memory runs out."""
        return within(self.budget, self.runtime.device, self.note, work)

    def choose_budget(self, tokenizer: PreTrainedTokenizerFast, splits: EncodedSplits) -> None:
        """Set the token budget; to be called before the first pass over rows, with the trained
        model on its device."""
        if self.choose_tokens is not None:
            chosen = self.choose_tokens(tokenizer, splits)
            self.note(f"micro-batches: {chosen}")
            self.budget.start_with(min(self.ranks.gather(chosen.tokens)))

    @property
    def placement(self) -> Placement:
        half = self.runtime.precision == "bf16"
        return Placement(self.runtime.device, torch.bfloat16 if half else torch.float32, self.note)

    def begin(self, steps: int) -> None:
        self.progress.begin(steps, self.snapshot.step if self.snapshot else 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(step, values)

    def advance(self, step: int, values: Mapping[str, float]) -> None:
        self.progress.advance(step, values)

    def note(self, line: str) -> None:
        self.progress.note(line)


def load_data(
    session: Session, context: int, tokenizer: PreTrainedTokenizerFast, announce: bool = True
) -> EncodedSplits:
    """Encoded rows for a model of that context length. announce: note what was dropped."""
    config = session.config
    splits = load_encoded(config.data, tokenizer, context, config.seed, Path(config.cache_dir))
    drops = splits.drops
    for line in (*drops.reading, *drops.summary_lines()) if announce else ():
        session.note(line)
    session.data_facts = {
        "name": config.data.name, "hub_id": config.data.hub_id, "path": config.data.path,
        "revision": splits.revision, "fingerprint": splits.fingerprint,
        "train_rows": len(splits.train), "eval_rows": len(splits.eval),
        "chat": is_chat(splits.train, tokenizer),
    }  # fmt: skip
    return splits
