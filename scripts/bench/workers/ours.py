"""dpo-run's side: a training stage as run by `dpo-run`, timed in a metric sink."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dpo_cli.distributed import ranks
from dpo_cli.plan.lengths import tokens_chooser
from dpo_cli.report.console import Progress
from dpo_cli.session.session import Session
from dpo_cli.stages import load_stage
from dpo_cli.train.flops import peak_tflops
from dpo_cli.train.runtime import start_runtime
from scripts.bench.job import Job, Window, work
from scripts.bench.lora import lora_overrides
from scripts.common import synchronize
from scripts.measuring import compose


class Measured(Exception):
    """Ends the run after the last timed step, before its checkpoint is written."""


class ClockSink:
    """A metric sink that passes each step's figures to the window."""

    def __init__(self, window: Window) -> None:
        self.window = window

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values and self.window.end_of_step(step, values):
            raise Measured  # on every rank: all of them log the same

    def close(self) -> None:
        """Nothing to close."""


class PhaseClock(Progress):
    """A silent progress display that sums the time of the passes over the reference."""

    def __init__(self, device: str) -> None:
        super().__init__("off")
        self.device = device
        self.reference_seconds: float | None = None

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        started = time.perf_counter()
        with super().phase(name, total) as tick:
            yield tick
        if name.startswith("reference"):
            synchronize(self.device)
            seconds = time.perf_counter() - started
            self.reference_seconds = (self.reference_seconds or 0.0) + seconds


def training_overrides(job: Job) -> list[str]:
    """Overrides with TRL's default optimizer settings, without evaluation, sampling and saving."""
    return [
        f"stage={job.task}", "model=custom", f"model.path={job.model}", *job.overrides,
        "optim=adamw", f"optim.lr={job.lr}", "optim.schedule=linear", "optim.warmup_steps=0",
        "optim.max_grad_norm=1.0", f"train.batch_size={job.batch}",
        f"train.max_steps={job.total_steps}", "train.shuffle=false", "train.eval_every_steps=0",
        "train.save_every_steps=0", "train.sample_prompts=0", "logger=none",
        f"hardware.device={job.device}", f"hardware.precision={job.precision}",
        f"hardware.threads={job.threads}", f"hardware.devices={job.devices}",
        f"run_dir={job.scratch}/run", f"cache_dir={job.scratch}/cache", *lora_overrides(job),
        *(f"{k}={v}" for k, v in job.settings.items()),
    ]  # fmt: skip


def join_ranks(job: Job) -> None:
    """Join the process group, in a process started by torch's launcher."""
    if job.devices > 1 and ranks.current().size == 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if job.device == "cuda" else "gloo")


def measure(job: Job, sink: Callable[[Window], ClockSink] = ClockSink) -> dict[str, Any]:
    """`run.run` without its lock, files and summary: the same stage, session and loop."""
    config = compose(training_overrides(job))
    stage = load_stage(config.stage.name)
    join_ranks(job)
    runtime = start_runtime(config.hardware, config.seed)
    run_dir = Path(f"{config.run_dir}-{runtime.ranks.rank}")
    run_dir.mkdir(parents=True)
    window, progress = Window(job), PhaseClock(job.device)
    chooser = tokens_chooser(config, runtime)
    session = Session(config, run_dir, runtime, progress, [sink(window)], choose_tokens=chooser)
    try:
        stage(session)
    except Measured:
        return window.result(
            reference_seconds=progress.reference_seconds, attention=session.kernel,
            peak_tflops=peak_tflops(runtime.device, runtime.precision),
            micro_batch_tokens=session.token_budget,
        )  # fmt: skip
    raise AssertionError("the run ended before its last step was logged")


if __name__ == "__main__":
    work(measure)
