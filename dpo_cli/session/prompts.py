"""The prompts to sample from, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.durable import write_checked_text
from dpo_cli.records import EncodedExample


def distinct_prompts(examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """The first example of each prompt."""
    first: dict[bytes, EncodedExample] = {}
    for example in examples:
        first.setdefault(example.prompt_ids.tobytes(), example)
    return list(first.values())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines atomically, with their checksum."""
    write_checked_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
