"""One run, top to bottom: lock the folder, record the settings, run the stage, summarize."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpo_cli.config import RunConfig, spec_of
from dpo_cli.distributed.ranks import current
from dpo_cli.durable.redact import redact
from dpo_cli.durable.stored import stored_yaml
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.model.base import OTHER_BASE
from dpo_cli.model.source import hub_commit
from dpo_cli.plan.lengths import tokens_chooser
from dpo_cli.report.card import write_model_card
from dpo_cli.report.console import Progress
from dpo_cli.report.curves import training_figures
from dpo_cli.report.files import (
    first_command,
    versions,
    write_redacted_json,
    write_run_files,
)
from dpo_cli.report.sinks import Sink, open_sinks
from dpo_cli.report.table import summary_table
from dpo_cli.run_folder import clear_leftovers
from dpo_cli.session.models import base_provenance
from dpo_cli.session.session import Session
from dpo_cli.session.trained import SEEN
from dpo_cli.stages import load_stage
from dpo_cli.train import checkpoint
from dpo_cli.train.guard import run_lock
from dpo_cli.train.memory import as_oom_error, halve_budget_for_restart
from dpo_cli.train.runtime import start_runtime

# Keys that may differ when a run is resumed.
MAY_CHANGE = (
    "run_dir", "resume", "dry_run", "cache_dir", "logger.",
    "hardware.device", "hardware.nodes", "hardware.sharding", "hardware.timeout_seconds",
    "hardware.memory_gb", "hardware.precision", "hardware.threads",
    "hardware.activation_checkpointing", "optim.lr",
    "train.eval_every_steps", "train.save_every_", "train.keep_checkpoints",
    "train.log_every_steps", "train.micro_batch_tokens", "train.sample_", "hardware.name",
    OTHER_BASE, "data.max_row_mb", "data.max_file_mb",
)  # fmt: skip


def run(config: RunConfig, argv: list[str]) -> dict[str, Any]:
    """Run the configured stage in `config.run_dir` and return its figures (summary.json)."""
    ranks = current()
    if not ranks.first:
        run_other_rank(config)
        return {}
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with run_lock(run_dir):
        clear_leftovers(run_dir)
        given = config
        config = ranks.from_first(lambda: dated(given, run_dir))
        snapshot = ranks.from_first(lambda: resume_point(config, run_dir))
        changed = write_run_files(run_dir, asdict(config), argv)
        runtime = start_runtime(config.hardware, config.seed)
        step = snapshot.step if snapshot else 0
        with Progress(config.logger.progress) as progress:
            if changed:
                progress.note(changed)
            for line in snapshot.skipped if snapshot else []:
                progress.note(f"checkpoint not used: {line}")
            if snapshot:
                progress.note(f"resuming after step {step} from {snapshot.folder}")
            with sinks_of(config, run_dir, step) as sinks:
                chooser = tokens_chooser(config, runtime)
                session = Session(config, run_dir, runtime, progress, sinks, snapshot, chooser)
                with as_oom_error(), halve_budget_for_restart(session.budget, run_dir):
                    figures = load_stage(config.stage.name)(session)
            return finish(config, run_dir, figures, argv, session)


def run_other_rank(config: RunConfig) -> None:
    """A rank other than the first: the same work, writing to a temporary folder."""
    own = config
    config = current().from_first(lambda: own)
    snapshot = current().from_first(lambda: None)
    runtime = start_runtime(config.hardware, config.seed)
    with tempfile.TemporaryDirectory(prefix="dpo-run-") as scratch, Progress("off") as progress:
        chooser = tokens_chooser(config, runtime)
        session = Session(config, Path(scratch), runtime, progress, [], snapshot, chooser)
        with as_oom_error(), halve_budget_for_restart(session.budget, Path(config.run_dir)):
            load_stage(config.stage.name)(session)


def finish(
    config: RunConfig, run_dir: Path, figures: dict[str, Any], argv: list[str], session: Session
) -> dict[str, Any]:
    """Write curves, model card, summary.json and the report; print a table."""
    figures |= training_figures(run_dir / "metrics.jsonl")
    if SEEN in session.data_facts:  # beside the held-out figures, wherever they go
        figures[SEEN] = session.data_facts[SEEN]
    summary = {"stage": config.stage.name, "run_dir": str(run_dir), **figures}
    if config.logger.plots:
        from dpo_cli.report.plots import draw_curves  # matplotlib is slow to import

        draw_curves(run_dir)
    if (run_dir / "final").is_dir() and spec_of(config.stage).trains:
        write_model_card(run_dir / "final", card_facts(config, figures, argv, session), run_dir)
    write_redacted_json(run_dir / "summary.json", summary)
    session.progress.show(summary_table(config.stage.name, figures.items()))
    if spec_of(config.stage).keeps_folder:
        session.progress.note(f"results in {run_dir}")
    if config.logger.report and spec_of(config.stage).reported:
        from dpo_cli.report.page import write_run_report  # so is jinja2

        path = write_run_report(run_dir, session.data_facts)
        session.progress.note(f"report: {path}")
    return summary


def dated(config: RunConfig, run_dir: Path) -> RunConfig:
    """With the date that chat templates see: of this run's start, of the run that made the model,
    or today."""
    date = config.data.date
    if date is None and config.resume:
        data = stored_yaml(run_dir / "config.yaml").get("data")
        date = data.get("date") if isinstance(data, dict) else None
    if date is None and config.model.path is not None:
        date = base_provenance(config.model).get("date")
    date = date or datetime.date.today().isoformat()
    return replace(config, data=replace(config.data, date=date))


def card_facts(
    config: RunConfig, figures: dict[str, Any], argv: list[str], session: Session
) -> dict[str, Any]:
    settings = asdict(config)
    model, adapted = settings["model"], ["lora"] if config.lora.name != "none" else []
    if model["hub_id"] and not model["path"]:
        model["revision"] = hub_commit(model["hub_id"], model["revision"])
    return {
        "stage": config.stage.name,
        "name": Path(config.run_dir).name,
        "model": {k: model[k] for k in ("name", "hub_id", "revision", "path")},
        "data": session.data_facts,
        "command": first_command(Path(config.run_dir)) or argv,
        "chat": session.data_facts.get("chat", False),
        "adapter": config.lora.name != "none",
        "config": {k: settings[k] for k in ("stage", *adapted, "optim", "train", "seed")},
        "results": figures,
        "versions": versions(),
    }


@contextmanager
def sinks_of(config: RunConfig, run_dir: Path, step: int) -> Iterator[list[Sink]]:
    training = spec_of(config.stage).trains
    sinks = open_sinks(config.logger, run_dir, step, asdict(config)) if training else []
    try:
        yield sinks
    finally:
        for sink in sinks:
            sink.close()


def resume_point(config: RunConfig, run_dir: Path) -> checkpoint.Snapshot | None:
    """The newest valid checkpoint of this run; None for a new run, or one that has saved none."""
    if not config.resume:
        return None
    stored = run_dir / "config.yaml"
    if not stored.is_file():
        raise CheckpointError(f"resume: {run_dir} is not a run folder (no config.yaml)")
    changes = differences(stored_yaml(stored), redact(asdict(config)))
    if changes:
        raise ConfigError(
            f"resume: settings differ from those of the run in {run_dir}: " + "; ".join(changes)
        )
    if not checkpoint.steps_in(run_dir / "checkpoints"):
        return None
    return checkpoint.newest_valid(run_dir / "checkpoints")


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every key that must not change between start and resume."""
    lines: list[str] = []
    for key in sorted({*before, *after}):
        path, old, new = f"{prefix}{key}", before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{path}.")
        elif old != new and not path.startswith(MAY_CHANGE):
            lines.append(f"{path}: {old} -> {new}")
    return lines
