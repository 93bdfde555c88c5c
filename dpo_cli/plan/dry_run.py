"""dry_run=true: the plan of a run, from tokenizer, rows and model shape, without weights."""

from __future__ import annotations

from rich.console import Console

from dpo_cli.config import RunConfig
from dpo_cli.plan.lengths import facts_of, planned_runtime
from dpo_cli.plan.memory.budget import fitting, is_open, with_tokens
from dpo_cli.plan.memory.facts import capacity
from dpo_cli.plan.memory.table import copy_rows, memory_rows
from dpo_cli.report.table import summary_table
from dpo_cli.session.preview import Preview, Row
from dpo_cli.stages import stage_module


def print_plan(config: RunConfig) -> None:
    """Print the plan of a run. Reads the tokenizer and the rows, and writes only the cache."""
    console = Console()
    rows, memory = plan_tables(config)
    console.print(summary_table("plan", rows))
    if memory:
        console.print(summary_table("memory, estimated", memory))


def plan_rows(config: RunConfig) -> list[Row]:
    """(name, value) lines of the plan, without those on memory."""
    return plan_tables(config)[0]


def plan_tables(config: RunConfig) -> tuple[list[Row], list[Row]]:
    """(name, value) lines of the plan, from the stage's `plan`, and of the memory estimate."""
    preview = Preview(config, planned_runtime(config.hardware, config.seed))
    rows = list(stage_module(config.stage.name).plan(preview))
    return [*rows, ("writes", config.run_dir)], planned_memory(preview)


def planned_memory(preview: Preview) -> list[Row]:
    """Lines of the memory estimate; empty for a stage that neither trains nor samples."""
    config, facts = preview.config, facts_of(preview)
    if facts is None:
        return []
    available = capacity(config.hardware, facts.device)
    if available is None or not is_open(config, facts.device):
        return [*memory_rows(config, facts, available), *copy_rows(config, facts)]
    chosen = fitting(config, facts, available)
    rows = memory_rows(with_tokens(config, chosen.tokens), facts, available)
    return [("micro-batches", str(chosen)), *rows, *copy_rows(config, facts)]
