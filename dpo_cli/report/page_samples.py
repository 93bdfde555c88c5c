"""Samples of a report: completions side by side, and a judge's matches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.report.numbers import figure, is_number
from dpo_cli.report.page_read import Folder, Row
from dpo_cli.report.page_story import path_name, point_name

MAX_CHARACTERS = 600  # of a prompt or a completion
MAX_REASON = 200  # characters of a judge's reason
MAX_ROWS = 40
MAX_ANSWERS = 4  # side by side
MAX_PROMPTS = 10
MATCH_KEYS = ("prompt", "policy", "opponent", "completion", "other", "verdict", "temperature")
VERDICTS = {"win": "wins", "loss": "loses", "tie": "ties"}  # others: no verdict


@dataclass(frozen=True)
class Text:
    """Text from outside, truncated. length: of the full text, in characters."""

    shown: str
    length: int

    @property
    def cut(self) -> bool:
        return len(self.shown) < self.length


def text(value: Any, most: int = MAX_CHARACTERS) -> Text:
    """The first `most` characters; line ends as `\\n`, stripped."""
    full = value if isinstance(value, str) else "" if value is None else str(value)
    full = full.replace("\r\n", "\n").strip()
    return Text(full if len(full) <= most else full[:most].rstrip(), len(full))


@dataclass(frozen=True)
class Answer:
    label: str
    completion: Text
    reward: str  # empty where unknown


@dataclass(frozen=True)
class Sample:
    """A prompt and the completions of one or several models."""

    prompt: Text
    answers: list[Answer]


@dataclass(frozen=True)
class Samples:
    """note: which rows these are; those beyond the first `open` are folded."""

    title: str
    note: str
    rows: list[Sample]
    open: int = 4

    @property
    def listed(self) -> bool:
        """One unlabeled completion per prompt: a list, not columns."""
        return all(len(row.answers) == 1 and not row.answers[0].label for row in self.rows)


def samples_of(folder: Folder) -> Samples | None:
    """A judge's matches; otherwise completions side by side: of the same prompts before, during and
    after training, or of several policies."""
    if matches := matches_of(folder):
        return matches
    rows = completions_of(folder)
    steps = sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})
    policies = list(dict.fromkeys(str(row["policy"]) for row in rows if "policy" in row))
    if len(policies) > 1:
        names = {str(row.get("policy")): point_name(row) for row in folder.points}
        chosen = spread(policies, MAX_ANSWERS)
        groups = [
            (names.get(policy) or path_name(policy), first_by_prompt(rows, "policy", policy))
            for policy in chosen
        ]
        return side_by_side("Completions of the same prompts", groups)
    if len(steps) > 1:
        chosen_steps = spread(steps, 3)
        whens = ("Before training", *["During"] * (len(chosen_steps) - 2), "After")
        groups = [
            (f"{when}: step {step:,}", first_by_prompt(rows, "step", step))
            for when, step in zip(whens, chosen_steps, strict=True)
        ]
        return side_by_side("Completions before, during and after", groups)
    return _listed(rows)


def completions_of(folder: Folder) -> list[Row]:
    return [row for row in folder.samples if "prompt" in row and "completion" in row]


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def first_by_prompt(rows: Sequence[Row], key: str = "", value: Any = None) -> dict[str, Row]:
    """prompt -> its first row with that value of `key`; without a key, its row of the last step."""
    rows_by_prompt: dict[str, Row] = {}
    for row in rows:
        prompt, known = _words(row["prompt"]), rows_by_prompt.get(_words(row["prompt"]))
        if key:
            selected = (str(row.get(key)) == str(value)) and known is None
        else:
            selected = known is None or _step(row) > _step(known)
        if selected:
            rows_by_prompt[prompt] = row
    return rows_by_prompt


def _step(row: Row) -> float:
    step = row.get("step")
    return step if is_number(step) else 0


def _words(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def side_by_side(title: str, groups: Sequence[tuple[str, dict[str, Row]]]) -> Samples | None:
    """Completions of the prompts that all groups share, one column per group."""
    first, *others = (rows for _, rows in groups)
    shared = [prompt for prompt in first if all(prompt in rows for rows in others)]
    rows = [
        Sample(text(prompt), [_answer(name, rows[prompt]) for name, rows in groups])
        for prompt in shared[:MAX_PROMPTS]
    ]
    note = "The first prompts of the rows, not selected."
    if len(shared) > len(rows):
        note = f"The first {len(rows)} of {len(shared):,} prompts, not selected."
    return Samples(title, note, rows) if rows else None


def _listed(rows: Sequence[Row]) -> Samples | None:
    samples = [Sample(text(_words(row["prompt"])), [_answer("", row)]) for row in rows[:MAX_ROWS]]
    note = (
        f"The first {len(samples)} of {len(rows):,}, not selected." if len(rows) > MAX_ROWS else ""
    )
    return Samples("Completions", note, samples, open=8) if samples else None


def _answer(name: str, row: Row) -> Answer:
    reward = row.get("reward")
    return Answer(
        name, text(row["completion"]), figure("reward", reward) if is_number(reward) else ""
    )


def matches_of(folder: Folder) -> Samples | None:
    """The first matches of verdicts.jsonl at each policy's first temperature, or None."""
    rows = [row for row in folder.verdicts if all(key in row for key in MATCH_KEYS)]
    policies = list(dict.fromkeys(str(row["policy"]) for row in rows))
    first = {policy: [r for r in rows if str(r["policy"]) == policy] for policy in policies}
    matches = [
        row for own in first.values() for row in own if row["temperature"] == own[0]["temperature"]
    ]
    if not matches:
        return None
    shown = _in_turn(matches, policies)[:MAX_ROWS]
    note = f"The first {len(shown)} of {len(matches):,}, not selected." \
        if len(shown) < len(matches) else ""  # fmt: skip
    opponent = path_name(str(rows[0]["opponent"]))
    return Samples(f"Matches against {opponent}", note, [_sample(row) for row in shown])


def _in_turn(matches: Sequence[Row], policies: Sequence[str]) -> list[Row]:
    """The first match of every policy, then the second of every policy, and so on."""
    seen = dict.fromkeys(policies, 0)
    turns = []
    for row in matches:
        turns.append(seen[str(row["policy"])])
        seen[str(row["policy"])] += 1
    order = sorted(range(len(matches)), key=lambda place: turns[place])
    return [matches[place] for place in order]


def _sample(row: Row) -> Sample:
    verdict = VERDICTS.get(str(row["verdict"]), "no verdict")
    at = f"temperature {figure('temperature', row['temperature'])}"
    ours = f"{path_name(str(row['policy']))}, {at}: {verdict}"
    reason = str(row.get("reason") or "")[:MAX_REASON]
    theirs = path_name(str(row["opponent"])) + (f" (judge: {reason})" if reason else "")
    return Sample(
        text(str(row["prompt"])),
        [
            Answer(ours, text(str(row["completion"])), ""),
            Answer(theirs, text(str(row["other"])), ""),
        ],
    )
