"""What a judge decided on, side by side: both completions of a prompt, and who won."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.report.page_read import Folder, Row
from dpo_cli.report.page_story import path_name
from dpo_cli.report.page_tables import MOST_ROWS, Answer, Sample, Samples
from dpo_cli.report.page_text import figure, text

KEYS = ("prompt", "policy", "opponent", "completion", "other", "verdict", "temperature")
MOST_REASON = 200  # characters
VERDICTS = {"win": "wins", "loss": "loses", "tie": "ties"}  # others: the judge said nothing


def duels_of(folder: Folder) -> Samples | None:
    """The first matches of verdicts.jsonl at each policy's first temperature; None without any."""
    rows = [row for row in folder.verdicts if all(key in row for key in KEYS)]
    policies = list(dict.fromkeys(str(row["policy"]) for row in rows))
    first = {policy: [r for r in rows if str(r["policy"]) == policy] for policy in policies}
    matches = [
        row for own in first.values() for row in own if row["temperature"] == own[0]["temperature"]
    ]
    if not matches:
        return None
    shown = _in_turn(matches, policies)[:MOST_ROWS]
    note = f"The first {len(shown)} of {len(matches):,}, not selected." \
        if len(shown) < len(matches) else ""  # fmt: skip
    opponent = path_name(str(rows[0]["opponent"]))
    return Samples(f"Matches against {opponent}", note, [_sample(row) for row in shown])


def _in_turn(matches: Sequence[Row], policies: Sequence[str]) -> list[Row]:
    """All policies' first matches before anyone's second."""
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
    reason = str(row.get("reason") or "")[:MOST_REASON]
    theirs = path_name(str(row["opponent"])) + (f" (judge: {reason})" if reason else "")
    return Sample(
        text(str(row["prompt"])),
        [
            Answer(ours, text(str(row["completion"])), ""),
            Answer(theirs, text(str(row["other"])), ""),
        ],
    )
