"""Rows of other tools' formats in dpo-run's columns: pure functions row -> row.

The result has some of the columns prompt, chosen, rejected, responses, scores, label. Values are
checked where they are read (`jsonl.parse`); what a format needs and lacks raises `BadRow`.
"""

from __future__ import annotations

import json
import os
from typing import Any

from dpo_cli.data.adapters.columns import as_number, as_text, column, kind, text
from dpo_cli.data.adapters.hh import ASSISTANT, HUMAN, dialogue_messages
from dpo_cli.data.adapters.messages import as_list, is_written, messages
from dpo_cli.data.drops import MISSING, BadRow

Row = dict[str, Any]

PROMPTS = ("prompt", "question", "instruction", "query", "input")
ANSWERS = ("completion", "response", "answer", "output", "chosen")
PAIRS = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("response_j", "response_k"),
)  # fmt: skip
SCORES = ("overall_score", "score", "fine-grained_score")
ROLES = {
    "human": "user", "user": "user", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bot": "assistant",
}  # fmt: skip


def first_of(row: Row, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def has(row: Row, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def value_of(row: Row, names: tuple[str, ...]) -> Any:
    """The first of these columns that has a value. BadRow if none has."""
    name = first_of(row, names)
    if name is None:
        raise BadRow(MISSING, names[0])
    return row[name]


def is_list_of(row: Row, name: str, *keys: str) -> bool:
    """Whether a column is a list of objects with these keys, or its JSON."""
    value = row.get(name)
    try:
        value = as_list(value, name)
    except BadRow:
        return False
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and all(key in first for key in keys)


def pair_of(row: Row) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if has(row, *pair)), None)


def conversations_of(row: Row) -> str | None:
    """The column of complete conversations."""
    names = ("messages", "conversations", "conversation")
    return next((name for name in names if is_list_of(row, name)), None)


# --- ShareGPT


def turns(value: Any, field: str) -> list[Row]:
    """ShareGPT's [{from, value}, ...] as messages."""
    value = as_list([value] if isinstance(value, dict) else value, field)
    if not isinstance(value, list):
        raise BadRow(f"is {kind(value)}, not a list of turns", field)
    return [_turn(turn, field) for turn in value]


def _turn(turn: Any, field: str) -> Row:
    if not isinstance(turn, dict):
        raise BadRow(f"has {kind(turn)} instead of a turn", field)
    if "from" not in turn:
        return turn  # a message already
    who, said = turn["from"], turn.get("value")
    if who == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(said, field)}
    if who not in ROLES:
        raise BadRow(f"has a turn from {who!r}, not one of {', '.join(ROLES)}", field)
    return {"role": ROLES[who], "content": said}


def _calls(value: Any, field: str) -> list[Row]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRow("has a function call that is not valid JSON", field) from error
    return [
        {"type": "function", "function": c} for c in (calls if isinstance(calls, list) else [calls])
    ]


def sharegpt(row: Row) -> Row:
    conversation = turns(column(row, "conversations"), "conversations")
    if not has(row, "chosen", "rejected"):
        return {"prompt": None, "chosen": conversation}
    pair = {name: turns(row[name], name) for name in ("chosen", "rejected")}
    return {"prompt": conversation, **pair}


# --- alpaca


def alpaca(row: Row) -> Row:
    prompt: Any = "\n".join(
        part for name in ("instruction", "input")
        if (part := as_text(row.get(name) or "", name)).strip()
    )  # fmt: skip
    if history := row.get("history"):
        said = [(as_text(q, "history"), as_text(a, "history")) for q, a in _two(history)]
        past = [
            {"role": role, "content": part}
            for exchange in said
            for role, part in zip(("user", "assistant"), exchange, strict=True)
        ]
        prompt = [*past, {"role": "user", "content": prompt}]
    pair = pair_of(row)
    answers = dict(zip(("chosen", "rejected"), (row[n] for n in pair), strict=True)) if pair else {}
    return {"prompt": prompt, **(answers or {"chosen": column(row, "output")})}


def _two(history: Any) -> list[Any]:
    if isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history):
        return history
    raise BadRow("is not a list of [question, answer]", "history")


# --- pairs


def pairs(row: Row) -> Row:
    chosen, rejected = (column(row, name) for name in pair_of(row) or PAIRS[0])
    name = first_of(row, PROMPTS)
    text_only = isinstance(chosen, str) and not is_written(chosen)
    if text_only and not any(each in row for each in PROMPTS):
        raise BadRow(MISSING, PROMPTS[0])
    return {"prompt": None if name is None else row[name], "chosen": chosen, "rejected": rejected}


def implicit(row: Row) -> Row:
    """Two texts that begin with the same prompt: it ends at the last white space of what they
    share, which the answers keep, or with the last `Assistant:` of transcripts."""
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    end = shared_prompt(chosen, rejected)
    if not end:
        raise BadRow("begins with no prompt that the rejected text shares", "chosen")
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def shared_prompt(chosen: str, rejected: str) -> int:
    """Characters of the prompt that two texts begin with; 0 if they share no word."""
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  # by characters
    end = shared.rfind(ASSISTANT)
    if end >= 0:
        return end + len(ASSISTANT)
    end = max((place for place, letter in enumerate(shared) if letter.isspace()), default=0)
    return end if shared[:end].strip() else 0


def axolotl(row: Row) -> Row:
    pair = {name: column(row, name) for name in ("chosen", "rejected")}
    return {"prompt": column(row, conversations_of(row) or "messages"), **pair}


def swift(row: Row) -> Row:
    conversation = messages(as_list(column(row, "messages"), "messages"), "messages")
    if has(row, "rejected_messages"):
        return {"prompt": None, "chosen": conversation, "rejected": row["rejected_messages"]}
    before, answer = conversation[:-1], conversation[-1]
    return {"prompt": before, "chosen": [answer], "rejected": text(row, "rejected_response")}


def helpsteer(row: Row) -> Row:
    """HelpSteer: a strength below zero prefers the first response."""
    first, second, strength = next((names for names in TWO if names[2] in row), TWO[0])
    preference = as_number(column(row, strength), strength)
    if preference == 0:
        raise BadRow("is 0, so that no response is preferred", strength)
    better, worse = (first, second) if preference < 0 else (second, first)
    prompt = row["context"] if row.get("context") is not None else column(row, "prompt")
    return {"prompt": prompt, "chosen": column(row, better), "rejected": column(row, worse)}


TWO = (
    ("response_1", "response_2", "preference_strength"),
    ("response1", "response2", "overall_preference"),
)

# --- ranked lists


def _ranked(row: Row, name: str, answer: str, prompt: Any) -> Row:
    """Objects with a rank, 1 or 0 the best."""
    items = _objects(row, name)
    return {
        "prompt": prompt,
        "responses": [column(item, answer) for item in items],
        "scores": [-as_number(column(item, "rank"), name) for item in items],
    }


def nemo(row: Row) -> Row:
    read = _ranked(row, "completions", "completion", column(row, "context"))
    if len(read["responses"]) != 2:
        return read
    best, worst = sorted((0, 1), key=lambda place: -read["scores"][place])
    if read["scores"][0] == read["scores"][1]:
        raise BadRow("have equal ranks, so that no response is preferred", "completions")
    chosen, rejected = (read["responses"][place] for place in (best, worst))
    return {"prompt": read["prompt"], "chosen": chosen, "rejected": rejected}


def nectar(row: Row) -> Row:
    prompt = text(row, "prompt")
    dialogue = prompt.startswith(HUMAN) and prompt.rstrip().endswith(ASSISTANT)
    return _ranked(
        row, "answers", "answer", dialogue_messages(prompt.rstrip()) if dialogue else prompt
    )


def ultrafeedback(row: Row) -> Row:
    items = _objects(row, "completions")
    name = next((n for n in SCORES if n in items[0]), None)
    if name is None:
        raise BadRow(f"have no score ({', '.join(SCORES)})", "completions")
    return {
        "prompt": value_of(row, PROMPTS),
        "responses": [column(item, "response") for item in items],
        "scores": [as_number(column(item, name), name) for item in items],
    }


def ranked(row: Row) -> Row:
    scores = {"scores": row["scores"]} if has(row, "scores") else {}
    return {"prompt": value_of(row, PROMPTS), "responses": column(row, "responses"), **scores}


def _objects(row: Row, name: str) -> list[Row]:
    items = as_list(column(row, name), name)
    if not isinstance(items, list) or not items or not all(isinstance(i, dict) for i in items):
        raise BadRow(f"is {kind(items)}, not a list of objects", name)
    return items


# --- one response


def kto(row: Row) -> Row:
    name = None if first_of(row, ANSWERS) else conversations_of(row)
    read = completion(row) if name is None else {"prompt": None, "chosen": row[name]}
    return read | {"label": column(row, "label")}


def completion(row: Row) -> Row:
    name = first_of(row, PROMPTS)
    return {"prompt": None if name is None else row[name], "chosen": value_of(row, ANSWERS)}
