"""Asynchronous checkpointing: when a save is due, and writing it while training continues.

Between two steps the state is copied; a thread then writes, hashes, syncs and publishes it during
the next steps. At most one save is pending. An error of the thread is raised in the loop after the
current step.
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.optim import Optimizer

from dpo_cli.config import RunConfig
from dpo_cli.durable import write_json
from dpo_cli.errors import UserError
from dpo_cli.train import checkpoint, contents
from dpo_cli.train.contents import Contents, Texts
from dpo_cli.train.host_copy import HostCopy
from dpo_cli.train.pace import Pace
from dpo_cli.train.task import TrainingSession, TrainTask

Best = dict[str, float]  # step and value of a held-out figure
REPORTED_SECONDS = 1.0  # longer saves are reported with their times


@dataclass(frozen=True)
class Job:
    """A save to be written."""

    run_dir: Path
    step: int
    contents: Contents
    facts: dict[str, Any]
    best: dict[str, Any] | None  # best.json
    keep: int
    protect: int | None

    @property
    def folder(self) -> Path:
        return self.run_dir / "checkpoints"


@dataclass(frozen=True)
class Times:
    """Wall-clock and CPU seconds of a job."""

    wall: float
    cpu: float


def publish(job: Job) -> Times:
    """Write and publish a checkpoint, then remove those that are no longer kept."""
    began, cpu = time.perf_counter(), time.thread_time()
    checkpoint.publish(job.folder, job.step, job.contents, job.facts)
    finish(job)
    return Times(time.perf_counter() - began, time.thread_time() - cpu)


def finish(job: Job) -> None:
    """After a checkpoint is published: update best.json and prune old checkpoints."""
    if job.best is not None:
        write_json(job.run_dir / "best.json", job.best)
    checkpoint.prune(job.folder, job.step, job.keep, job.protect)


class Saves:
    """The checkpoints of a run; leaving its context waits for the pending save.

    best_saved: the best of the saved steps. The loop's own best does not depend on what was saved.
    """

    def __init__(self, task: TrainTask, session: TrainingSession, optimizer: Optimizer) -> None:
        config, runtime = session.config, session.runtime
        self.task, self.config, self.runtime = task, config, runtime
        self.note, self.optimizer = session.note, optimizer
        self.run_dir = Path(config.run_dir)
        self.best_saved: Best | None = None
        self.pace = Pace(config.train.save_every_minutes)
        self._host = HostCopy(runtime.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dpo-run-save")
        # Step, seconds waited, result
        self._pending: tuple[int, float, Future[Times]] | None = None
        self._tokenizer: Texts | None = None
        self._unsaved: Best | None = None  # the best so far, for best.json after the pending save
        self._noted: set[str] = set()
        self._prepared = False

    def __enter__(self) -> Saves:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait() if error is None else self.wait_quietly()
        finally:
            self._thread.shutdown()
            self._host.close()

    @property
    def busy(self) -> bool:
        return self._pending is not None and not self._pending[2].done()

    def due(self) -> bool:
        """Whether a save is due by time; rank 0's clock decides."""
        if self.config.train.save_every_steps is not None:
            return False
        ranks = self.runtime.ranks
        return ranks.any(ranks.first and self.pace.due(self.busy))

    def affords(self, best: Best | None) -> bool:
        """Whether a step may be saved only because it is the best; if not, notes it once."""
        train = self.config.train
        if train.save_every_steps is not None or train.save_every_minutes is not None:
            return True
        if self.runtime.ranks.from_first(lambda: self.pace.affordable(self.busy)):
            return True
        self._unsaved = best
        if self._pending is None:
            self._write_best()
        self._note_once(
            "not every best step is saved: that would take more than 2% of the run's time "
            "(set train.save_every_steps to save all of them)"
        )
        return False

    def poll(self) -> None:
        """After a step: report a finished save, or raise its error."""
        if not self._prepared:
            self._prepared = True
            self._prepare()
        if self._pending is not None and self._pending[2].done():
            self.wait()

    def wait(self) -> None:
        """Wait for the pending save, if any. Raises its error, such as DiskError."""
        if self._pending is None:
            return
        (step, waited, future), self._pending = self._pending, None
        times = future.result()
        on_cpu = self.runtime.device.type == "cpu"  # training shares its cores with the writer
        self.pace.written(times.wall, times.cpu if on_cpu else 0.0)
        self._report(step, waited, f", written in {times.wall:.0f} s", waited + times.wall)
        self._write_best()

    def wait_quietly(self) -> None:
        """Wait while another error is being raised; a save's own error becomes a note."""
        try:
            self.wait()
        except UserError as error:
            self.note(f"a checkpoint could not be saved: {error}")

    def save(self, step: int, best: Best | None, last: bool) -> None:
        """Save the current state. last: no step follows, so it is published on return."""
        began = time.perf_counter()
        self.wait()
        if best is not None and best["step"] == step:
            self.best_saved = best
        self._unsaved = None
        job = self._job(step, best)
        if self.runtime.ranks.size > 1:
            self._save_sharded(job, best)
        elif last or not self._has_memory(job.contents):
            publish(job)
        else:
            copied = replace(job, contents=self._host.take(job.contents))
            future = self._thread.submit(publish, copied)
            self._pending = (step, time.perf_counter() - began, future)
        waited = time.perf_counter() - began
        self.pace.stopped(waited)
        if self._pending is None:
            self._report(step, waited, "", waited)

    def _prepare(self) -> None:
        """Allocate memory for copies if any will be made; the optimizer has its state by now."""
        train, alone = self.config.train, self.runtime.ranks.size == 1
        on_device = self.runtime.device.type != "cpu"
        if alone and on_device and (train.save_every_steps != 0 or train.eval_every_steps != 0):
            self._host.prepare(self._contents(0, None))

    def _job(self, step: int, best: Best | None) -> Job:
        train, task = self.config.train, self.task
        state = self._contents(step, best) if self.runtime.ranks.size == 1 else Contents()
        return Job(
            self.run_dir, step, state,
            {"config_sha256": _config_digest(self.config), "data": task.identity.get("rows")},
            self._best_file(best), train.keep_checkpoints,
            None if self.best_saved is None else int(self.best_saved["step"]),
        )  # fmt: skip

    def _state(self, best: Best | None) -> dict[str, Any]:
        task = self.task
        return {
            "best": best, "best_saved": self.best_saved, "steps": task.steps,
            "identity": task.identity, "carried": task.carried(),
            "micro_batch_tokens": task.budget.state(),
        }  # fmt: skip

    def _contents(self, step: int, best: Best | None) -> Contents:
        task = self.task
        if self._tokenizer is None:  # once: it is slow, and does not change
            self._tokenizer = {**contents.of_tokenizer(task.tokenizer), **task.files}
        state = checkpoint.state_json(step, self._state(best))
        weights = contents.of_model(task.model, self._tokenizer, task.provenance)
        training = contents.of_training(self.optimizer, task.heads, state)
        carried = task.carried_tensors()
        own = Contents({}, {contents.CARRIED: carried}) if carried else Contents()
        return weights | training | own

    def _save_sharded(self, job: Job, best: Best | None) -> None:
        task, ranks = self.task, self.runtime.ranks
        checkpoint.save(
            job.folder, job.step, task.model, task.tokenizer, self.optimizer, self._state(best),
            task.provenance, task.heads, ranks, job.facts,
        )  # fmt: skip
        if ranks.first:
            finish(job)

    def _has_memory(self, state: Contents) -> bool:
        reason = self._host.refusal(state)
        if reason is not None:
            self._note_once(f"training waits for each save: {reason}")
        return reason is None

    def _best_file(self, best: Best | None) -> dict[str, Any] | None:
        """best.json: the best step so far, and its checkpoint; `saved`: the best that has one."""
        if best is None:
            return None
        values: dict[str, Any] = {**best, "metric": self.config.train.best_metric}
        if self.best_saved is not None and self.best_saved["step"] == best["step"]:
            return values | {"folder": _folder(best)}
        saved: dict[str, Any] | None = self.best_saved and {
            **self.best_saved,
            "folder": _folder(self.best_saved),
        }
        return values | {"folder": None, "saved": saved}

    def _write_best(self) -> None:
        if self._unsaved is not None and self.runtime.ranks.first:
            write_json(self.run_dir / "best.json", self._best_file(self._unsaved))
        self._unsaved = None

    def _report(self, step: int, waited: float, written: str, seconds: float) -> None:
        line = f"saved checkpoints/step-{step}"
        if seconds >= REPORTED_SECONDS:
            line += f" (training waited {waited:.1f} s{written})"
        self.note(line)

    def _note_once(self, line: str) -> None:
        if line not in self._noted:
            self._noted.add(line)
            self.note(line)


def _folder(best: Best) -> str:
    return f"checkpoints/step-{int(best['step'])}"


def _config_digest(config: RunConfig) -> str:
    """sha256 of all settings except those of where and how the run was started."""
    started = ("run_dir", "resume", "dry_run", "cache_dir")
    settings = {key: value for key, value in asdict(config).items() if key not in started}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
