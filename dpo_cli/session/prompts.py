"""The prompts that are sampled, and the rows that come of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from dpo_cli.data.dataset import load_splits
from dpo_cli.durable import write_checked_text
from dpo_cli.records import EncodedExample, Prompt
from dpo_cli.session.session import Session


def source_prompts(
    session: Session, tokenizer: PreTrainedTokenizerFast
) -> dict[str, dict[int, Prompt]]:
    """split -> row -> the prompt as the source has it: text, or the messages of a chat."""
    splits = load_splits(session.config.data, session.config.seed, tokenizer)
    return {
        "train": {e.row: e.prompt for e in splits.train},
        "eval": {e.row: e.prompt for e in splits.eval},
    }


def distinct_prompts(examples: list[EncodedExample]) -> list[EncodedExample]:
    """The first example of each prompt."""
    first: dict[bytes, EncodedExample] = {}
    for example in examples:
        first.setdefault(example.prompt_ids.tobytes(), example)
    return list(first.values())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, written whole or not at all, with their checksum."""
    write_checked_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
