"""stage=sample: completions of the dataset's prompts, to train.jsonl and eval.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from dpo_cli.config import RunConfig, SampleConfig
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.model.load import context_length, load_tokenizer
from dpo_cli.model.sampling.generate import SamplingOptions
from dpo_cli.session.lengths import (
    finished_share,
    new_tokens,
    unfinished_line,
    with_new_tokens,
)
from dpo_cli.session.models import load
from dpo_cli.session.preview import Preview, Row, data_rows, device_row, model_rows
from dpo_cli.session.prompts import distinct_prompts, write_rows
from dpo_cli.session.sampling import complete, decoded_together
from dpo_cli.session.session import Session, load_data
from dpo_cli.session.workload import Workload, sampling_workload


def run(session: Session) -> dict[str, Any]:
    """Write one row per prompt and temperature, {prompt, completions, finished, temperature};
    returns `counts` of each split."""
    stage = cast(SampleConfig, session.config.stage)
    tokenizer = load_tokenizer(session.config.model)
    model = load(session, session.config.model, tokenizer)
    model.to(session.runtime.device)  # type: ignore[arg-type]
    splits = load_data(session, context_length(model), tokenizer)
    stage = with_new_tokens(stage, [*splits.train, *splits.eval], session.note)
    limits = {"train": (splits.train, stage.prompts), "eval": (splits.eval, stage.eval_prompts)}
    figures: dict[str, Any] = {}
    for name, (examples, limit) in limits.items():
        chosen = distinct_prompts(examples)[:limit]
        if not chosen:
            continue
        prompts = [e.prompt_ids for e in chosen]
        by_temperature = []
        for options in sampling_options(session, stage):
            at = f" at {options.temperature:g}" * (len(stage.temperatures) > 1)
            with session.progress.phase(f"sampling ({name}{at})", len(prompts)) as tick:
                rows = complete(session, model, tokenizer, prompts, options, tick)
            by_temperature.append((options.temperature, rows))
        write_rows(session.run_dir / f"{name}.jsonl", [
            {
                "prompt": e.prompt,
                "completions": [c["completion"] for c in rows[index]],
                "finished": [c["finished"] for c in rows[index]],
                "temperature": temperature,
            }
            for index, e in enumerate(chosen) for temperature, rows in by_temperature
        ])  # fmt: skip
        flat = [c for _, rows in by_temperature for row in rows for c in row]
        figures |= {f"{name}_{k}": v for k, v in counts(len(chosen), flat).items()}
        if line := unfinished_line(figures[f"{name}_finished"], new_tokens(stage)):
            session.note(f"{name}: {line}")
    return figures


def plan(preview: Preview) -> Iterator[Row]:
    yield "stage", "sample"
    yield from model_rows(preview)
    yield from data_rows(preview)
    yield device_row(preview)


def workload(config: RunConfig, splits: EncodedSplits) -> Workload:
    return sampling_workload(cast(SampleConfig, config.stage), splits)


def sampling_options(session: Session, stage: SampleConfig) -> list[SamplingOptions]:
    """One per temperature, each with its own seed; a single completion if greedy."""
    return [
        SamplingOptions(
            completions=stage.completions if temperature > 0 else 1,
            temperature=temperature,
            top_p=stage.top_p,
            max_new_tokens=new_tokens(stage),
            seed=session.config.seed + 7919 * index,
            batch_size=decoded_together(session, stage),
        )
        for index, temperature in enumerate(stage.temperatures)
    ]


def counts(prompts: int, completions: list[dict[str, Any]]) -> dict[str, float]:
    """Prompts, completions, sampled tokens, and `finished_share`."""
    return {
        "prompts": prompts,
        "completions": len(completions),
        "tokens": sum(c["tokens"] for c in completions),
        **finished_share([c["finished"] for c in completions], prompts),
    }
