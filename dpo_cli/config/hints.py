"""Suggestions for mistyped keys and options, and lists of the valid ones."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import types
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from dpo_cli.config import (
    DATA_SCHEMAS,
    JUDGE_SCHEMAS,
    REWARD_FN_SCHEMAS,
    STAGE_SCHEMAS,
    RunConfig,
)
from dpo_cli.config.keys import Fact
from dpo_cli.config.peers import counterpart

TABLES: dict[str, Mapping[str, type]] = {
    "data": DATA_SCHEMAS,
    "stage": STAGE_SCHEMAS,
    "reward_fn": REWARD_FN_SCHEMAS,
    "judge": JUDGE_SCHEMAS,
}

PRESET = "preset"  # the group whose options set other groups: it has no keys of its own

ENVIRONMENT = {  # keys that would be written to files -> where they are read
    "judge.api_key": "OPENAI_API_KEY",
    "judge.base_url": "OPENAI_BASE_URL",
    "judge.url": "OPENAI_BASE_URL",
}

ALIASES = {  # what other tools call a key -> its name here
    "lora.rank": "lora.r",
    "lora.lora_r": "lora.r",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
}


def renamed(schema: Any) -> dict[str, str]:
    """Names of keys in earlier versions -> their current names."""
    fields = dataclasses.fields(schema)
    return {fact.old: f.name for f in fields if (fact := f.metadata.get("fact")) and fact.old}


@functools.cache
def known_facts() -> list[tuple[str, Fact]]:
    """(dotted key, facts) of every group and option; a key may occur several times."""
    hints = get_type_hints(RunConfig)
    schemas = [(group, schema) for group, table in TABLES.items() for schema in table.values()]
    schemas += [(group, hints[group]) for group in groups() if group not in TABLES]
    return [
        (f"{group}.{field.name}", field.metadata["fact"])
        for group, schema in schemas
        for field in dataclasses.fields(schema)
    ]


def renamed_keys() -> dict[str, str]:
    """Keys of earlier versions -> the same keys now."""
    return {f"{key.partition('.')[0]}.{fact.old}": key for key, fact in known_facts() if fact.old}


def path_keys() -> set[str]:
    """Keys whose values name files or folders."""
    return {key for key, fact in known_facts() if fact.path}


def optional(hint: Any) -> tuple[Any, bool]:
    """(X, True) for `X | None`, (X, False) for X; X may be a union itself."""
    if get_origin(hint) is not types.UnionType:
        return hint, False
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return functools.reduce(operator.or_, kinds), len(kinds) < len(get_args(hint))


def leaf_keys(schema: Any, prefix: str) -> list[str]:
    """Full paths of a schema's keys, nested ones included."""
    hints = get_type_hints(schema)
    keys = []
    for field in dataclasses.fields(schema):
        kind, _ = optional(hints[field.name])
        path = f"{prefix}{field.name}"
        keys += [path, *leaf_keys(kind, f"{path}.")] if dataclasses.is_dataclass(kind) else [path]
    return keys


def option_schema(group: str, option: str) -> Any:
    """The dataclass of a group's option; None for an option that names no schema."""
    table = TABLES.get(group)
    return table.get(option) if table else get_type_hints(RunConfig)[group]


def group_keys(group: str, option: str) -> list[str]:
    """Full paths of a group's keys; `option` picks the schema of data and stage."""
    schema = option_schema(group, option)
    return leaf_keys(schema, f"{group}.") if schema else []


def groups() -> list[str]:
    """Names of the config groups, in the order of a run's configuration."""
    hints = get_type_hints(RunConfig)
    return [
        f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(hints[f.name])
    ]


def choosable() -> list[str]:
    """Groups that take an option on the command line."""
    return [*groups(), PRESET]


def root_keys() -> list[str]:
    """Keys outside the groups."""
    return [f.name for f in dataclasses.fields(RunConfig) if f.name not in groups()]


def valid_keys(options: Mapping[str, str]) -> list[str]:
    """Every key a run may set; `options` names the chosen data and stage."""
    return root_keys() + [k for g in groups() for k in group_keys(g, options.get(g, ""))]


def unknown_key(path: str, options: Mapping[str, str]) -> str:
    """The error line for a key that the chosen options do not have."""
    holders = _holders(options)
    if path in ENVIRONMENT:
        return f"{path}: unknown key; set the environment variable {ENVIRONMENT[path]}"
    if path in ALIASES:
        return f"{path}: unknown key; did you mean {ALIASES[path]}?"
    if path in holders:
        group = path.partition(".")[0]
        return f"{path}: not a key of {group}={options.get(group)}; it belongs to {holders[path]}"
    valid = valid_keys(options)
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(valid)}
    leaf = path.rpartition(".")[2]
    # Compare the last part as well: the shared `stage.` makes any two keys similar.
    similar = [key for key in (*valid, *holders) if _similar(leaf, key.rpartition(".")[2])]
    close = difflib.get_close_matches(path, similar, n=1, cutoff=0.6)
    close_leaf = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)
    if leaf in by_leaf:
        hint = f"did you mean {by_leaf[leaf]}?"
    elif "." not in path and (theirs := counterpart(path)):
        hint = theirs
    elif close:
        hint = f"did you mean {close[0]}{_of(holders.get(close[0]))}?"
    else:
        hint = f"did you mean {by_leaf[close_leaf[0]]}?" if close_leaf else "see dpo-run --cfg job"
    return f"{path}: unknown key; {hint}"


def _similar(word: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, word, other).ratio() >= 0.6


def _of(holder: str | None) -> str:
    return f", a key of {holder}" if holder else ""


def _holders(options: Mapping[str, str]) -> dict[str, str]:
    """Keys that only other options have -> these options, `stage=dpo, ...`."""
    valid = set(valid_keys(options))
    holders: dict[str, list[str]] = {}
    for group, table in TABLES.items():
        for option in table:
            for key in group_keys(group, option):
                if key not in valid:
                    holders.setdefault(key, []).append(f"{group}={option}")
    return {key: ", ".join(names) for key, names in holders.items()}
