"""What `stage=inspect` prints: examples token by token, lengths, dropped and truncated rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.chat import turn_end
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.data.drops import response_name
from dpo_cli.escapes import visible
from dpo_cli.records import EncodedExample

PERCENTILES = (5, 50, 95, 100)
FIRST, LAST = 12, 12  # tokens shown of each end of a prompt or response
STYLES = {"prompt": "dim", "target": "green", "EOS": "bold yellow"}


def describe(
    splits: EncodedSplits,
    tokenizer: PreTrainedTokenizerBase,
    examples: int = 3,
    split: str = "train",
) -> list[RenderableType]:
    """Renderables for a rich console. Data is never interpreted as markup."""
    rows = splits.train if split == "train" else splits.eval
    return [
        _overview(splits),
        _lengths(rows, split),
        *(_tokens(example, tokenizer) for example in rows[:examples]),
    ]


def _overview(splits: EncodedSplits) -> Text:
    commit = f" at commit {splits.revision}" if splits.revision else ""
    lines = [
        f"{splits.origin}{commit}",
        f"{len(splits.train):,} training and {len(splits.eval):,} held-out examples "
        f"of {splits.drops.read:,} rows",
        f"data.max_length={splits.limits.max_length}, "
        f"data.max_prompt_length={splits.limits.max_prompt_length} (tokens)",
        *(splits.drops.summary_lines() or ["no row dropped or truncated"]),
    ]
    return Text("\n".join(visible(line) for line in lines))


def _lengths(examples: Sequence[EncodedExample], split: str) -> Table:
    table = Table(title=f"tokens of {len(examples):,} {split} examples", title_justify="left")
    table.add_column("")
    for percentile in PERCENTILES:
        table.add_column("max" if percentile == 100 else f"p{percentile}", justify="right")
    for name, lengths in _length_groups(examples):
        values = np.percentile(lengths, PERCENTILES, method="nearest")
        table.add_row(name, *(f"{int(v):,}" for v in values))
    return table


def _length_groups(examples: Sequence[EncodedExample]) -> Iterator[tuple[str, list[int]]]:
    if not examples:
        return
    yield "prompt", [len(e.prompt_ids) for e in examples]
    most = max(len(e.response_ids) for e in examples)
    for place in range(most):
        lengths = [len(e.response_ids[place]) for e in examples if place < len(e.response_ids)]
        yield response_name(place, most), lengths
    yield "packed", [e.packed_tokens for e in examples]


def _tokens(example: EncodedExample, tokenizer: PreTrainedTokenizerBase) -> Table:
    """Prompt, then each response; only `target` tokens count in the loss."""
    table = Table(title=f"row {example.row}", title_justify="left")
    for heading in ("part", "place", "id", "token", "role"):
        table.add_column(heading, justify="right" if heading in {"place", "id"} else "left")
    _add_part(table, "prompt", example.prompt_ids, tokenizer)
    for place, ids in enumerate(example.response_ids):
        _add_part(table, response_name(place, len(example.response_ids)), ids, tokenizer)
    return table


def _add_part(table: Table, part: str, ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> None:
    table.add_section()
    ends = {
        tokenizer.eos_token_id,
        None if tokenizer.chat_template is None else turn_end(tokenizer),
    }
    for place, token in enumerate(ids.tolist()):
        if FIRST <= place < len(ids) - LAST:
            if place == FIRST:
                table.add_row(part, "", "", f"... {len(ids) - FIRST - LAST:,} more", "")
            continue
        last = place == len(ids) - 1
        role = "EOS" if last and token in ends else "target"
        role = "prompt" if part == "prompt" else role
        cells = (part, str(place), str(token), token_text(token, tokenizer), role)
        table.add_row(*(Text(cell) for cell in cells), style=STYLES[role])
    if part != "prompt" and int(ids[-1]) not in ends:
        table.add_row(part, "", "", "", "truncated: no EOS", style="bold red")


def token_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """One token with its leading space, which decoding strips for sentencepiece tokenizers."""
    text = str(tokenizer.decode([token]))
    raw = str(tokenizer.convert_ids_to_tokens(token))
    if raw.startswith("▁") and not text.startswith(" "):
        text = f" {text}"
    return visible(text).replace(" ", "·")
