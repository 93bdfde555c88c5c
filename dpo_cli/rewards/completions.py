"""Values that a model computes for sampled completions, encoded as in training and packed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import DataConfig
from dpo_cli.data.adapters.hh import to_messages
from dpo_cli.data.drops import BadRow, DropReport
from dpo_cli.data.encode import encode_completed
from dpo_cli.data.limits import resolve_limits
from dpo_cli.data.part import for_tokenizer
from dpo_cli.errors import DataError
from dpo_cli.model.attention.interface import MAX_TOKENS, kernel_of
from dpo_cli.model.load import context_length
from dpo_cli.model.rope import cuts_of
from dpo_cli.packing import pack_sorted
from dpo_cli.records import Batch, EncodedExample, Prompt
from dpo_cli.rewards.scorers import Completed
from dpo_cli.session.session import Session

MAX_BRANCHES = 16  # completions per copy of their prompt, so that packs stay short


@dataclass
class Encoding:
    """Encodes completions as in the training of `model`, truncated as the run's `data` group says.

    The first call that truncates notes it on the console.
    """

    session: Session
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    noted: bool = field(default=False, init=False)

    def __call__(self, rows: Sequence[Completed]) -> list[EncodedExample]:
        config, drops = self.session.config.data, DropReport(read=len(rows))
        limits = resolve_limits(config, context_length(self.model))
        config, texts = as_read_by(self.tokenizer, config, rows)
        plain = [(*text, row.finished) for text, row in zip(texts, rows, strict=True)]
        encoded = encode_completed(plain, self.tokenizer, config, limits, drops)
        for line in [] if self.noted else drops.summary_lines():
            self.session.note(f"completions: {line}")
            self.noted = True
        return encoded


def as_read_by(
    tokenizer: PreTrainedTokenizerFast, config: DataConfig, rows: Sequence[Completed]
) -> tuple[DataConfig, list[tuple[Prompt, str]]]:
    """The data settings and (prompt, completion) as this tokenizer's model reads them.

    HH's dialogues are messages for a scoring model with a chat template and text for one without,
    independent of the sampling model.
    """
    texts = [(row.prompt, row.completion) for row in rows]
    if config.name != "hh" or config.chat_template != "auto":
        return config, texts
    if tokenizer.chat_template is None:
        return replace(config, chat_template="human_assistant"), texts
    try:
        return for_tokenizer(config, tokenizer), [
            (to_messages(prompt), text.strip()) if isinstance(prompt, str) else (prompt, text)
            for prompt, text in texts
        ]
    except BadRow as bad:
        raise DataError(f"a completion cannot be scored: {bad}") from bad


@torch.no_grad()
def values_of(
    session: Session,
    model: PreTrainedModel,
    examples: Sequence[EncodedExample],
    compute: Callable[[Batch], Tensor],
    keep_last: bool = False,
) -> list[float]:
    """`compute(packed row) -> (S,)` for examples of one response, in their order.

    A prompt is computed once for its responses, and equal responses get the same value: in packs of
    different lengths they would differ by rounding, which would look like a preference.
    """
    budget = min(session.token_budget, MAX_TOKENS.get(kernel_of(model), session.token_budget))
    cuts = sorted({*session.cuts, *cuts_of(model.config)})  # those of both models of a log-ratio
    values = [0.0] * len(examples)
    for shared, places in _sharing_prompts(examples):
        batches = list(pack_sorted(shared, budget, keep_last, cuts))
        results = session.ranks.spread(
            batches, lambda batch: compute(batch.to(session.runtime.device)).cpu()
        )
        for batch, branch_values in zip(batches, results, strict=True):
            ranked = branch_values.view(-1, batch.branches).tolist()
            for example, row in zip(batch.example_ids.tolist(), ranked, strict=True):
                for equal, value in zip(places[example], row, strict=True):
                    for i in equal:
                        values[i] = value
    return values


Places = list[list[int]]  # for each response of an example, the rows that have it


def _sharing_prompts(
    examples: Sequence[EncodedExample],
) -> Iterator[tuple[list[EncodedExample], list[Places]]]:
    """Group rows by prompt: one example per prompt with its distinct responses, grouped by their
    number."""
    prompts: dict[bytes, dict[bytes, list[int]]] = {}
    for i, example in enumerate(examples):
        (response,) = example.response_ids
        rows = prompts.setdefault(example.prompt_ids.tobytes(), {})
        rows.setdefault(response.tobytes(), []).append(i)
    by_count: dict[int, list[Places]] = defaultdict(list)
    for responses in prompts.values():
        distinct = list(responses.values())
        for first in range(0, len(distinct), MAX_BRANCHES):
            part = distinct[first : first + MAX_BRANCHES]
            by_count[len(part)].append(part)
    for places in by_count.values():
        yield (
            [
                replace(
                    examples[part[0][0]],
                    response_ids=tuple(examples[equal[0]].response_ids[0] for equal in part),
                )
                for part in places
            ],
            places,
        )
