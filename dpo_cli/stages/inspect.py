"""stage=inspect: the encoded rows, token by token. Trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from rich.console import Console

from dpo_cli.config import InspectConfig
from dpo_cli.data.show import describe
from dpo_cli.model.load import configured_context, load_tokenizer
from dpo_cli.session.preview import Preview, Row, data_rows, device_row, model_rows
from dpo_cli.session.session import Session, load_data


def run(session: Session) -> dict[str, Any]:
    stage = cast(InspectConfig, session.config.stage)
    tokenizer = load_tokenizer(session.config.model)
    context = configured_context(session.config.model, tokenizer)
    splits = load_data(session, context, tokenizer, announce=False)
    console = Console()
    for part in describe(splits, tokenizer, stage.examples, stage.split):
        console.print(part)
    return {"train_rows": len(splits.train), "eval_rows": len(splits.eval)}


def plan(preview: Preview) -> Iterator[Row]:
    yield "stage", "inspect"
    yield from model_rows(preview)
    yield from data_rows(preview)
    yield device_row(preview)
