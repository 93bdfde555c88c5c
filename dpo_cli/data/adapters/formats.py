"""The formats of `data=jsonl`, recognized by the columns of the first rows.

`FORMATS` of config/datasets.py names and describes them; `READERS` has, of each, a test of a row's
columns and the function that reads it (layouts.py). A new format is a line in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_cli.config import JsonlDataConfig
from dpo_cli.config.datasets import COLUMN_KEYS
from dpo_cli.data.adapters import layouts
from dpo_cli.data.adapters.columns import column
from dpo_cli.data.adapters.layouts import (
    ANSWERS,
    PROMPTS,
    TWO,
    Row,
    conversations_of,
    first_of,
    has,
    is_list_of,
    pair_of,
    shared_prompt,
    value_of,
)
from dpo_cli.data.adapters.messages import is_written

DEFAULTS = JsonlDataConfig()
LOOKED_AT = 100  # rows


@dataclass(frozen=True)
class Format:
    matches: Callable[[Row], bool]
    read: Callable[[Row], Row]


def recognized(config: JsonlDataConfig, rows: Sequence[Row]) -> JsonlDataConfig:
    """With the first of READERS, the most specific one, that any of the first rows has. It holds
    for all rows: a pair that lacks a response is a bad row, not a demonstration."""
    if config.format != "auto":
        return config
    name = "columns"
    if all(getattr(config, key) == getattr(DEFAULTS, key) for key in COLUMN_KEYS):
        first = (rows[place] for place in range(min(len(rows), LOOKED_AT)))
        found = {_format_of(row) for row in first}
        name = next((each for each in READERS if each in found), name)
    return replace(config, format=name)


def _format_of(row: Row) -> str | None:
    return next((name for name, format_ in READERS.items() if format_.matches(row)), None)


def in_columns(row: Row, config: JsonlDataConfig) -> tuple[Row, JsonlDataConfig]:
    """A row in the columns that the returned configuration names. Raises BadRow."""
    if config.format in ("auto", "columns"):
        return row, config
    read = READERS[config.format].read(row)
    for key in ("system", "tools"):
        source = getattr(config, f"{key}_field")
        if source is not None and row.get(source) is not None:
            read = {key: row[source], **read}
    fields: dict[str, Any] = {
        f"{key}_field": key if key in read else None
        for key in ("rejected", "responses", "scores", "label", "system")
    }
    tools = "tools" if config.tools_field else None
    return read, replace(
        config, prompt_field="prompt", chosen_field="chosen", tools_field=tools, **fields
    )


READERS: dict[str, Format] = {
    "sharegpt": Format(lambda r: is_list_of(r, "conversations", "from", "value"), layouts.sharegpt),
    "swift": Format(
        lambda r: is_list_of(r, "messages")
        and (has(r, "rejected_response") or has(r, "rejected_messages")),
        layouts.swift,
    ),
    "axolotl": Format(
        lambda r: bool(conversations_of(r)) and has(r, "chosen", "rejected")
        and not has(r, "prompt"), layouts.axolotl,
    ),
    "nemo": Format(
        lambda r: has(r, "context") and is_list_of(r, "completions", "rank"), layouts.nemo
    ),
    "ultrafeedback": Format(
        lambda r: bool(first_of(r, PROMPTS)) and is_list_of(r, "completions", "response"),
        layouts.ultrafeedback,
    ),
    "nectar": Format(
        lambda r: has(r, "prompt") and is_list_of(r, "answers", "answer", "rank"), layouts.nectar
    ),
    "helpsteer": Format(lambda r: any(has(r, *names) for names in TWO), layouts.helpsteer),
    "alpaca": Format(
        lambda r: has(r, "instruction") and not has(r, "prompt")
        and (has(r, "output") or has(r, "chosen", "rejected")),
        layouts.alpaca,
    ),
    "implicit": Format(
        lambda r: all(isinstance(r.get(n), str) for n in ("chosen", "rejected"))
        and not first_of(r, PROMPTS) and shared_prompt(r["chosen"], r["rejected"]) > 0
        and not is_written(r["chosen"]),
        layouts.implicit,
    ),
    "pairs": Format(lambda r: pair_of(r) is not None, layouts.pairs),
    "ranked": Format(
        lambda r: bool(first_of(r, PROMPTS)) and isinstance(r.get("responses"), list),
        layouts.ranked,
    ),
    "kto": Format(
        lambda r: has(r, "label") and bool(first_of(r, ANSWERS) or conversations_of(r)),
        layouts.kto,
    ),
    "completion": Format(
        lambda r: bool(first_of(r, PROMPTS)) and bool(first_of(r, ANSWERS)), layouts.completion
    ),
    "messages": Format(
        lambda r: bool(conversations_of(r)),
        lambda r: {"prompt": None, "chosen": column(r, conversations_of(r) or "messages")},
    ),
    "text": Format(
        lambda r: isinstance(r.get("text"), str),
        lambda r: {"prompt": "", "chosen": column(r, "text")},
    ),
    "prompts": Format(
        lambda r: bool(first_of(r, PROMPTS)),
        lambda r: {"prompt": value_of(r, PROMPTS), "responses": []},
    ),
}  # fmt: skip
