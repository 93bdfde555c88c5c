"""Metric sinks: metrics.jsonl always, TensorBoard and Weights & Biases by configuration."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from dpo_cli.config import LoggerConfig
from dpo_cli.durable import disk_errors, encode, write_bytes
from dpo_cli.durable.redact import redact
from dpo_cli.errors import ConfigError
from dpo_cli.escapes import printable, printable_values
from dpo_cli.report.files import drop_rows_after, to_json


class Sink(Protocol):
    """Takes metrics by optimizer step; names as in metrics.jsonl (`loss`, `eval/loss`, ...)."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    logger: LoggerConfig, run_dir: Path, resume_step: int, config: dict[str, Any]
) -> list[Sink]:
    """Open every sink that `logger` configures.

    resume_step: the optimizer step the run resumes from, 0 for a run from the start.
    Rows logged after it belong to lost work and are removed, from samples.jsonl too.
    config: the resolved configuration, for sinks that show it; secrets are redacted.
    Raises ConfigError (a sink that is not installed or not set up) and DiskError.
    """
    with disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    drop_rows_after(run_dir / "samples.jsonl", _last_kept_step(resume_step))
    sinks = []
    with ExitStack() as opened:
        for name, open_sink in SINKS.items():
            if name == "jsonl" or getattr(logger, name):
                sink = open_sink(run_dir, resume_step, logger, config)
                opened.callback(sink.close)
                sinks.append(sink)
        opened.pop_all()
    return sinks


def _last_kept_step(resume_step: int) -> int:
    # A run that starts over also repeats what it logs at step 0.
    return resume_step if resume_step > 0 else -1


class JsonlSink:
    """metrics.jsonl: one object per line, `{"step": 3, "time": "...", "loss": 0.69, ...}`.

    NaN and infinities are null. Each row is flushed at once, so a killed process loses none.
    """

    def __init__(
        self, run_dir: Path, resume_step: int, logger: LoggerConfig, config: dict[str, Any]
    ) -> None:
        self._path = run_dir / "metrics.jsonl"
        drop_rows_after(self._path, _last_kept_step(resume_step))
        with disk_errors(self._path):
            self._file = self._path.open("ab")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with disk_errors(self._path):
            self._file.write(encode(to_json({"step": step, "time": now, **values}) + "\n"))
            self._file.flush()

    def close(self) -> None:
        with disk_errors(self._path):
            self._file.close()


class TensorboardSink:
    """Event files in `tensorboard/`; `tensorboard --logdir <run folder>` shows them."""

    def __init__(
        self, run_dir: Path, resume_step: int, logger: LoggerConfig, config: dict[str, Any]
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "logger.tensorboard=true, but TensorBoard cannot be imported: "
                "pip install tensorboard or set logger.tensorboard=false"
            ) from error
        self._folder = run_dir / "tensorboard"
        first_step = _last_kept_step(resume_step) + 1  # purge_step itself is purged, too
        with disk_errors(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=first_step, flush_secs=10)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with disk_errors(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        with disk_errors(self._folder):
            self._writer.close()


class WandbSink:
    """A Weights & Biases run; its id is stored in wandb_run_id.txt, so a resumed run continues it.

    W&B cannot rewind its own counter: the step is logged as a metric and is the x axis of every
    chart, so that steps repeated after a crash are in the right place.
    """

    def __init__(
        self, run_dir: Path, resume_step: int, logger: LoggerConfig, config: dict[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "logger.wandb=true, but wandb is not installed: "
                "pip install dpo-run[wandb] or set logger.wandb=false"
            ) from error
        try:
            self._run = wandb.init(
                project=printable(
                    logger.wandb_project or os.environ.get("WANDB_PROJECT") or "dpo-run"
                ),
                name=printable(run_dir.name),
                id=_wandb_run_id(run_dir / "wandb_run_id.txt"),
                resume="allow",
                dir=str(run_dir),
                config=printable_values(redact(config)),
                save_code=False,
                # its metadata holds the raw command line, its console log whatever is printed
                settings=wandb.Settings(console="off", disable_git=True, x_disable_meta=True),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logger.wandb=true, but W&B cannot start ({redact(str(error))}): run "
                "`wandb login`, set WANDB_MODE=offline, or set logger.wandb=false"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({name: float(value) for name, value in values.items()} | {"step": step})

    def close(self) -> None:
        self._run.finish()


def _wandb_run_id(path: Path) -> str:
    with disk_errors(path):
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(4)
    write_bytes(path, encode(run_id + "\n"))
    return run_id


SINKS: dict[str, Callable[[Path, int, LoggerConfig, dict[str, Any]], Sink]] = {
    "jsonl": JsonlSink,
    "tensorboard": TensorboardSink,
    "wandb": WandbSink,
}
