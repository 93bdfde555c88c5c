"""Raw rows to examples: run the dataset's adapter and drop rows that cannot be used."""

from __future__ import annotations

import dataclasses
import json

from dpo_cli.config import DataConfig, JsonlDataConfig
from dpo_cli.config.datasets import FORMATS, described
from dpo_cli.data.adapters import ADAPTERS
from dpo_cli.data.adapters.formats import LOOKED_AT, recognized
from dpo_cli.data.drops import MISSING, BadRow, DropReport, response_name
from dpo_cli.data.files import Most, Row, too_long
from dpo_cli.data.notes import note_scores
from dpo_cli.data.sources import Rows
from dpo_cli.errors import DataError
from dpo_cli.records import PreferenceExample, Prompt, Response, response_text

DEEPEST = 64  # lists and objects within each other; templates and JSON recurse


def adapt(rows: Rows, config: DataConfig, seed: int, drops: DropReport) -> list[PreferenceExample]:
    """Examples of the rows. Unusable rows are counted in `drops`; DataError if none is usable.

    A column that the first rows lack is treated as a wrong setting, not as bad rows.
    """
    parse = ADAPTERS[config.name]
    config = _with_format(config, rows, drops)
    examples_of_all: list[PreferenceExample] = []
    most = Most.of(config).row
    for index, row in rows.numbered(config.max_rows, seed):
        drops.read += 1
        if problem := _oversized(row, most):
            raise DataError(f"{rows.origin}, row {index}: {problem}")
        try:
            examples = list(parse(row, index, config))
        except BadRow as bad:
            if drops.read == 1 and bad.reason == MISSING and _is_nowhere(bad.field, rows):
                raise DataError(_missing_column(rows.origin, config, bad.field, row)) from bad
            drops.add(str(bad), index)
            continue
        if not examples:
            drops.add("row gives no example", index)
        for example in examples:
            if problem := _problem(example):
                drops.add(problem, index)
            else:
                examples_of_all.append(example)
    for example in examples_of_all:
        note_scores(example, drops)
    examples_of_all = in_one_form(examples_of_all)
    if not examples_of_all:
        reasons = "; ".join(drops.summary_lines()) or "it is empty"
        raise DataError(f"{rows.origin}: no row can be used: {reasons}")
    return examples_of_all


def _is_nowhere(field: str, rows: Rows) -> bool:
    """Whether none of the first rows has a column."""
    return not any(field in rows.rows[place] for place in range(min(len(rows.rows), LOOKED_AT)))


def _with_format(config: DataConfig, rows: Rows, drops: DropReport) -> DataConfig:
    """With the format of the rows, which is reported."""
    if not isinstance(config, JsonlDataConfig):
        return config
    config = recognized(config, rows.rows)
    if config.format in FORMATS:
        drops.reading.append(f"{len(rows.rows):,} rows, read as {described(config.format)}")
    return config


def in_one_form(examples: list[PreferenceExample]) -> list[PreferenceExample]:
    """If some prompts are conversations, text prompts become user messages: rows with and without
    a system message have the same form."""
    if all(isinstance(e.prompt, str) for e in examples):
        return examples
    return [
        dataclasses.replace(e, prompt=[{"role": "user", "content": e.prompt}])
        if isinstance(e.prompt, str) else e
        for e in examples
    ]  # fmt: skip


def _oversized(row: Row, most: int) -> str | None:
    """Why a row is too long or too deep. most: characters."""
    size, deep = 0, []
    for value in row.values():
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, (dict, list)):
            deep.append((value, 1))
    while deep and size <= most:
        value, depth = deep.pop()
        if depth > DEEPEST:
            return f"nested more than {DEEPEST} deep"
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, str):
                size += len(part)
            elif isinstance(part, (dict, list)):
                deep.append((part, depth + 1))
    return too_long(most) if size > most else None


def _problem(example: PreferenceExample) -> str | None:
    """Why nothing can be learned from an example, or None."""
    prompt, responses = example.prompt, example.responses
    for place, response in enumerate(responses):
        calls = not isinstance(response, str) and "tool_calls" in response
        if not (response_text(response).strip() or calls):
            return f"{response_name(place, len(responses))} is blank"
    if any(response in responses[:place] for place, response in enumerate(responses)):
        return f"{'chosen and rejected' if len(responses) == 2 else 'responses'} are the same"
    if not all(map(_is_unicode, (prompt, *responses))):
        return "text contains a lone surrogate, which is not a valid character"
    return None


def _is_unicode(part: Prompt | Response) -> bool:
    """False for lone surrogates, which JSON escapes can put into a str."""
    try:  # not `str`, which would escape lone surrogates inside a message
        json.dumps(part, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _missing_column(origin: str, config: DataConfig, field: str, row: dict[str, object]) -> str:
    keys = [f"data.{f.name}=" for f in dataclasses.fields(config) if f.name.endswith("_field")]
    named = [k for k in keys if getattr(config, k[5:-1]) == field]
    remedy = " or ".join(named or keys) or "data=jsonl with data.chosen_field= etc."
    return (
        f"{origin}: no column {field!r} (it has: {', '.join(map(str, row)) or 'none'}): "
        f"set {remedy}"
    )
