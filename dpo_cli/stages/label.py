"""stage=label: preference pairs from sampled completions, labeled by a reward."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dpo_cli.config import LabelConfig
from dpo_cli.data.adapters.columns import as_bool
from dpo_cli.data.adapters.messages import messages
from dpo_cli.data.drops import BadRow
from dpo_cli.data.files import Meter, Most, bounded_lines
from dpo_cli.durable import mismatch
from dpo_cli.errors import DataError
from dpo_cli.evaluation.labels import Pair, all_pairs, bradley_terry, flipped
from dpo_cli.records import Prompt
from dpo_cli.rewards.implicit import implicit_reward
from dpo_cli.rewards.scorers import Completed, Scorer
from dpo_cli.rewards.scoring import load_scorer, scoring_rows
from dpo_cli.session.preview import Preview, Row
from dpo_cli.session.prompts import write_rows
from dpo_cli.session.session import Session

ROWS_AT_ONCE = 512  # per call of the scorer: full batches of similar lengths, yet a progress bar


@dataclass(frozen=True)
class Sampled:
    """A row of stage=sample: a prompt and its completions.

    finished: per completion; None if the row lacks it, and all count as finished.
    """

    prompt: Prompt
    completions: list[str]
    finished: list[bool] | None

    @property
    def completed(self) -> list[Completed]:
        finished = self.finished or [True] * len(self.completions)
        pairs = zip(self.completions, finished, strict=True)
        return [Completed(self.prompt, text, ended) for text, ended in pairs]


def run(session: Session) -> dict[str, Any]:
    """Write all pairs of completions, one row per pair, for each file of stage.samples; returns
    `pair_figures` of each. Raises DataError."""
    stage = cast(LabelConfig, session.config.stage)
    assert stage.samples is not None  # checked with the configuration
    if unfinished(Path(stage.samples)):
        raise DataError(
            f"stage.samples={stage.samples}: this run did not finish, so samples may be missing: "
            f"finish it with dpo-run resume={stage.samples}"
        )
    files = {name: Path(stage.samples) / f"{name}.jsonl" for name in ("train", "eval")}
    limits = Most.of(session.config.data)
    sampled = {name: read_rows(path, limits) for name, path in files.items() if path.is_file()}
    if not sampled:
        raise DataError(f"stage.samples={stage.samples}: contains no train.jsonl or eval.jsonl")
    implicit = stage.by == "implicit"
    score = implicit_reward(session, stage) if implicit else load_scorer(session)
    figures: dict[str, Any] = {}
    for name, rows_read in sampled.items():
        rows = [without_blanks(row) for row in rows_read]
        if blank := sum(not text.strip() for row in rows_read for text in row.completions):
            session.note(f"{name}: {blank} blank {_completions(blank, 'is', 'are')} dropped")
        if truncated := sum(not finished for row in rows for finished in row.finished or ()):
            session.note(
                f"{name}: {truncated} {_completions(truncated, 'was', 'were')} truncated by "
                "stage=sample: train with data.finished_field=finished, or the policy learns to "
                "stop there"
            )
        scores = score_all(session, score, rows, name)
        rng = random.Random(f"{session.config.seed} {name}")
        labeled = [label(row, s, stage, rng) for row, s in zip(rows, scores, strict=True)]
        if not any(labeled):
            raise DataError(
                f"{files[name]}: no two completions of a prompt differ in reward; sample more per "
                "prompt (stage=sample stage.completions=8) or at a higher temperature "
                "(stage.temperatures=[1.0]), or label with another reward_fn"
            )
        write_rows(session.run_dir / f"{name}.jsonl", pair_rows(rows, scores, labeled))
        facts = pair_figures(scores, labeled, drawn=is_drawn(stage))
        figures |= {f"{name}_{k}": v for k, v in facts.items()}
    return figures


def plan(preview: Preview) -> Iterator[Row]:
    yield "stage", "label"
    yield from scoring_rows(preview.config)


def unfinished(folder: Path) -> bool:
    """Whether a folder is that of a run that has not finished."""
    return (folder / "config.yaml").is_file() and not (folder / "summary.json").is_file()


def _completions(count: int, one: str, several: str) -> str:
    return f"completion {one}" if count == 1 else f"completions {several}"


def without_blanks(row: Sampled) -> Sampled:
    """Remove blank completions, whose pairs data=jsonl would drop."""
    indices = [i for i, text in enumerate(row.completions) if text.strip()]
    finished = None if row.finished is None else [row.finished[i] for i in indices]
    return Sampled(row.prompt, [row.completions[i] for i in indices], finished)


def score_all(
    session: Session, score: Scorer, rows: Sequence[Sampled], name: str
) -> list[list[float]]:
    """Scores of each row's completions. One call scores a whole row, so equal texts tie."""
    scores: list[list[float]] = []
    with session.progress.phase(f"scoring ({name})", len(rows)) as tick:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            values = iter(score([completed for row in part for completed in row.completed]))
            scores += [list(itertools.islice(values, len(row.completions))) for row in part]
            tick(len(part))
    return scores


def is_drawn(stage: LabelConfig) -> bool:
    """Whether a label may contradict the scores."""
    return stage.labels == "bradley_terry" or stage.flip_rate > 0


def label(
    row: Sampled, scores: Sequence[float], stage: LabelConfig, rng: random.Random
) -> list[Pair]:
    """The labeled pairs of one row: pairs of different texts with different scores."""
    texts = row.completions
    pairs = [p for p in all_pairs(scores) if texts[p.chosen] != texts[p.rejected]]
    if stage.labels == "bradley_terry":
        pairs = bradley_terry(pairs, scores, stage.temperature, rng)
    return flipped(pairs, stage.flip_rate, rng)


def pair_rows(
    rows: Sequence[Sampled], scores: Sequence[Sequence[float]], labeled: Sequence[Sequence[Pair]]
) -> list[dict[str, Any]]:
    """Rows {prompt, chosen, rejected, scores} for data=jsonl, with `finished` if known."""
    return [
        pair_row(row, values, pair)
        for row, values, pairs in zip(rows, scores, labeled, strict=True)
        for pair in pairs
    ]


def pair_row(row: Sampled, scores: Sequence[float], pair: Pair) -> dict[str, Any]:
    pair_fields: dict[str, Any] = {
        "prompt": row.prompt,
        "chosen": row.completions[pair.chosen],
        "rejected": row.completions[pair.rejected],
        "scores": [scores[pair.chosen], scores[pair.rejected]],
    }
    if row.finished is not None:  # data.finished_field: truncated responses get no EOS
        pair_fields["finished"] = [row.finished[pair.chosen], row.finished[pair.rejected]]
    return pair_fields


def pair_figures(
    scores: Sequence[Sequence[float]], labeled: Sequence[Sequence[Pair]], drawn: bool
) -> dict[str, float]:
    """pairs; mean_gap: mean of chosen minus rejected score; ties: fraction of all pairs, which are
    dropped; agreement: fraction of labels that agree with the scores, if labels are random."""
    gaps = [
        values[p.chosen] - values[p.rejected]
        for values, pairs in zip(scores, labeled, strict=True)
        for p in pairs
    ]
    possible = sum(len(values) * (len(values) - 1) // 2 for values in scores)
    figures = {
        "pairs": len(gaps),
        "mean_gap": sum(gaps) / len(gaps),
        "ties": 1.0 - len(gaps) / possible,
    }
    return figures | ({"agreement": sum(g > 0 for g in gaps) / len(gaps)} if drawn else {})


def read_rows(path: Path, limits: Most) -> list[Sampled]:
    """Rows of a file written by stage=sample. Raises DataError with file and line."""
    if reason := mismatch(path):
        raise DataError(reason)
    # As text, lines would also split at U+2028, which JSON may contain.
    with path.open("rb") as stream:
        return list(_rows(path, bounded_lines(stream, Meter(path, limits))))


def _rows(path: Path, lines: Iterable[bytes]) -> Iterable[Sampled]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompt, texts = row["prompt"], row["completions"]
            if not isinstance(prompt, str):
                prompt = messages(prompt, "prompt")
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise TypeError("completions must be a list of strings")
            yield Sampled(prompt, texts, _finished(row, len(texts)))
        except (ValueError, KeyError, TypeError, RecursionError, BadRow) as error:
            raise DataError(
                f"{path}:{number}: not a row {{prompt, completions}} of stage=sample: {error}"
            ) from None


def _finished(row: dict[str, Any], count: int) -> list[bool] | None:
    if "finished" not in row:
        return None
    values = row["finished"]
    if not isinstance(values, list) or len(values) != count:
        raise TypeError("finished must be a list of one bool per completion")
    return [as_bool(value, "finished") for value in values]
