"""stage=label: pairs out of sampled completions, labelled by a ground-truth reward."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

from dpo_cli.config import LabelConfig
from dpo_cli.errors import DataError
from dpo_cli.evaluation.labels import all_pairs, bradley_terry, flipped
from dpo_cli.evaluation.scorers import SCORERS
from dpo_cli.stages.sample import as_text, write_rows
from dpo_cli.stages.session import Session


def run(session: Session) -> dict[str, Any]:
    """All pairs of a prompt's completions, one row a pair, for each file of stage.samples."""
    stage = cast(LabelConfig, session.config.stage)
    assert stage.samples is not None  # checked with the configuration
    figures: dict[str, Any] = {}
    for name in ("train", "eval"):
        source = Path(stage.samples) / f"{name}.jsonl"
        if not source.is_file():
            continue
        rng = random.Random(f"{session.config.seed} {name}")
        rows = [pair for row in read_rows(source) for pair in label_row(row, stage, rng)]
        if not rows:
            raise DataError(f"{source}: no two completions of a prompt differ in reward")
        write_rows(session.run_dir / f"{name}.jsonl", rows)
        figures[f"{name}_pairs"] = len(rows)
        figures[f"{name}_mean_gap"] = sum(r["scores"][0] - r["scores"][1] for r in rows) / len(rows)
    if not figures:
        raise DataError(f"stage.samples={stage.samples}: no train.jsonl or eval.jsonl there")
    return figures


def label_row(row: dict[str, Any], stage: LabelConfig, rng: random.Random) -> list[dict[str, Any]]:
    """{prompt, completions} -> rows {prompt, chosen, rejected, scores}."""
    prompt, completions = row["prompt"], row["completions"]
    scores = SCORERS[stage.scorer]([as_text(prompt) + c for c in completions])
    pairs = all_pairs(scores)
    if stage.labels == "bradley_terry":
        pairs = bradley_terry(pairs, scores, stage.temperature, rng)
    return [
        {
            "prompt": prompt,
            "chosen": completions[p.chosen],
            "rejected": completions[p.rejected],
            "scores": [scores[p.chosen], scores[p.rejected]],
        }
        for p in flipped(pairs, stage.flip_rate, rng)
        if completions[p.chosen].strip() and completions[p.rejected].strip()
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that stage=sample wrote. Raises DataError with file and line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            completions = row["completions"]
            if not isinstance(completions, list) or not all(
                isinstance(c, str) for c in completions
            ):
                raise TypeError("completions must be a list of texts")
            rows.append({"prompt": row["prompt"], "completions": completions})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: not a sampled row {{prompt, completions}}: {error}"
            ) from None
    return rows
