"""stage=sample: completions of the dataset's prompts, to train.jsonl and eval.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from dpo_cli.config import SampleConfig
from dpo_cli.durable import write_text
from dpo_cli.model.load import context_length, load_model, load_tokenizer
from dpo_cli.records import EncodedExample
from dpo_cli.stages.session import Session, complete, load_data, sampling_options


def run(session: Session) -> dict[str, Any]:
    """One row a prompt: {prompt, completions: [...]}; the figures count what was written."""
    stage = cast(SampleConfig, session.config.stage)
    tokenizer = load_tokenizer(session.config.model)
    model = load_model(session.config.model, tokenizer, session.config.seed)
    model.to(session.runtime.device)  # type: ignore[arg-type]
    splits = load_data(session, context_length(model), tokenizer)
    limits = {"train": (splits.train, stage.prompts), "eval": (splits.eval, stage.eval_prompts)}
    options = sampling_options(
        session, stage.completions, stage.temperature, stage.top_p,
        stage.max_new_tokens, stage.batch_size,
    )  # fmt: skip
    figures: dict[str, Any] = {}
    for name, (examples, limit) in limits.items():
        prompts = distinct_prompts(examples)[:limit]
        if not prompts:
            continue
        with session.progress.phase(f"sampling ({name})", len(prompts)) as tick:
            rows = complete(session, model, tokenizer, prompts, options, tick)
        write_rows(session.run_dir / f"{name}.jsonl", [
            {"prompt": row[0]["prompt"], "completions": [c["completion"] for c in row]}
            for row in rows
        ])  # fmt: skip
        figures[f"{name}_prompts"] = len(prompts)
        figures[f"{name}_tokens"] = sum(c["tokens"] for row in rows for c in row)
        figures[f"{name}_finished"] = sum(c["finished"] for row in rows for c in row) / (
            len(prompts) * stage.completions
        )
    return figures


def distinct_prompts(examples: list[EncodedExample]) -> list[Any]:
    """Each prompt once, in the order of its first row."""
    seen = {e.prompt_ids.tobytes(): e.prompt_ids for e in reversed(examples)}
    first: dict[bytes, Any] = {}
    for example in examples:
        first.setdefault(example.prompt_ids.tobytes(), seen[example.prompt_ids.tobytes()])
    return list(first.values())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, written whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
