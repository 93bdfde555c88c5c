"""A run's checkpoints: when they are due, and how little of them the loop waits for.

Between two steps the state is copied; a thread then writes, hashes, syncs and publishes it while
the next steps are taken. One save is under way at a time. What the thread ran into is raised in
the loop, after the step that is then done.
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
TOLD_SECONDS = 1.0  # saves that take longer are told with their times


@dataclass(frozen=True)
class Job:
    """What is left to do of a save."""

    run_dir: Path
    step: int
    made: Contents
    facts: dict[str, Any]
    best: dict[str, Any] | None  # best.json
    keep: int
    protect: int | None

    @property
    def folder(self) -> Path:
        return self.run_dir / "checkpoints"


@dataclass(frozen=True)
class Times:
    """Seconds that a job took, and those in which it computed."""

    wall: float
    computed: float


def publish(job: Job) -> Times:
    """Write and publish a checkpoint, then remove those that are no longer kept."""
    began, computed = time.perf_counter(), time.thread_time()
    checkpoint.publish(job.folder, job.step, job.made, job.facts)
    tidy(job)
    return Times(time.perf_counter() - began, time.thread_time() - computed)


def tidy(job: Job) -> None:
    """After a checkpoint is published."""
    if job.best is not None:
        write_json(job.run_dir / "best.json", job.best)
    checkpoint.prune(job.folder, job.step, job.keep, job.protect)


class Saves:
    """The checkpoints of one run; leaving its context waits for the one under way.

    kept: the best of the steps that were saved. The best of all is the loop's own, which does
    not depend on what was saved when.
    """

    def __init__(self, task: TrainTask, session: TrainingSession, optimizer: Optimizer) -> None:
        config, runtime = session.config, session.runtime
        self.task, self.config, self.runtime = task, config, runtime
        self.note, self.optimizer = session.note, optimizer
        self.run_dir = Path(config.run_dir)
        self.kept: Best | None = None
        self.pace = Pace(config.train.save_every_minutes)
        self._host = HostCopy(runtime.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dpo-run-save")
        self._pending: tuple[int, float, Future[Times]] | None = None  # step, stood still, end
        self._tokenizer: Texts | None = None
        self._unsaved: Best | None = None  # the best so far, to be told after the pending one
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
            self.wait() if error is None else self.settle()
        finally:
            self._thread.shutdown()
            self._host.close()

    @property
    def busy(self) -> bool:
        return self._pending is not None and not self._pending[2].done()

    def due(self) -> bool:
        """Whether the time has come; the first rank's clock decides for all."""
        if self.config.train.save_every_steps is not None:
            return False
        ranks = self.runtime.ranks
        return ranks.any(ranks.first and self.pace.due(self.busy))

    def affords(self, best: Best | None) -> bool:
        """Whether a step may be saved only because it is the best; if not, that is told."""
        train = self.config.train
        if train.save_every_steps is not None or train.save_every_minutes is not None:
            return True
        if self.runtime.ranks.from_first(lambda: self.pace.affordable(self.busy)):
            return True
        self._unsaved = best
        if self._pending is None:
            self._tell_best()
        self._note_once(
            "best steps are not all saved: that would take more than 2% of the run's time "
            "(train.save_every_steps saves them whatever it takes)"
        )
        return False

    def look(self) -> None:
        """After a step: tell of a save that was published meanwhile, or raise what it ran into."""
        if not self._prepared:
            self._prepared = True
            self._prepare()
        if self._pending is not None and self._pending[2].done():
            self.wait()

    def wait(self) -> None:
        """Until none is under way. Raises what it ran into, such as DiskError."""
        if self._pending is None:
            return
        (step, stood, future), self._pending = self._pending, None
        times = future.result()
        on_cpu = self.runtime.device.type == "cpu"  # whose cores train, too
        self.pace.written(times.wall, times.computed if on_cpu else 0.0)
        self._tell(step, stood, f", written in {times.wall:.0f} s", stood + times.wall)
        self._tell_best()

    def settle(self) -> None:
        """Wait beside an error that is the one to tell."""
        try:
            self.wait()
        except UserError as error:
            self.note(f"a checkpoint could not be saved: {error}")

    def save(self, step: int, best: Best | None, last: bool) -> None:
        """Save the state of now. last: no step follows, so it is published on return."""
        began = time.perf_counter()
        self.wait()
        if best is not None and best["step"] == step:
            self.kept = best
        self._unsaved = None
        job = self._job(step, best)
        if self.runtime.ranks.size > 1:
            self._save_together(job, best)
        elif last or not self._has_room(job.made):
            publish(job)
        else:
            future = self._thread.submit(publish, replace(job, made=self._host.take(job.made)))
            self._pending = (step, time.perf_counter() - began, future)
        stood = time.perf_counter() - began
        self.pace.stopped(stood)
        if self._pending is None:
            self._tell(step, stood, "", stood)

    def _prepare(self) -> None:
        """Make room for copies, where any will be taken; the optimiser has its state by now."""
        train, alone = self.config.train, self.runtime.ranks.size == 1
        on_device = self.runtime.device.type != "cpu"
        if alone and on_device and (train.save_every_steps != 0 or train.eval_every_steps != 0):
            self._host.prepare(self._contents(0, None))

    def _job(self, step: int, best: Best | None) -> Job:
        train, task = self.config.train, self.task
        made = self._contents(step, best) if self.runtime.ranks.size == 1 else Contents()
        return Job(
            self.run_dir, step, made,
            {"config_sha256": _config_digest(self.config), "data": task.identity.get("rows")},
            self._best_file(best), train.keep_checkpoints,
            None if self.kept is None else int(self.kept["step"]),
        )  # fmt: skip

    def _state(self, best: Best | None) -> dict[str, Any]:
        task = self.task
        return {
            "best": best, "best_saved": self.kept, "steps": task.steps, "identity": task.identity,
            "carried": task.carried(), "micro_batch_tokens": task.budget.state(),
        }  # fmt: skip

    def _contents(self, step: int, best: Best | None) -> Contents:
        task = self.task
        if self._tokenizer is None:  # once: it takes a while, and does not change
            self._tokenizer = {**contents.of_tokenizer(task.tokenizer), **task.files}
        state = checkpoint.stamped(step, self._state(best))
        weights = contents.of_model(task.model, self._tokenizer, task.provenance)
        return weights | contents.of_training(self.optimizer, task.heads, state)

    def _save_together(self, job: Job, best: Best | None) -> None:
        task, ranks = self.task, self.runtime.ranks
        checkpoint.save(
            job.folder, job.step, task.model, task.tokenizer, self.optimizer, self._state(best),
            task.provenance, task.heads, ranks, job.facts,
        )  # fmt: skip
        if ranks.first:
            tidy(job)

    def _has_room(self, made: Contents) -> bool:
        why = self._host.refusal(made)
        if why is not None:
            self._note_once(f"saves stop the training: {why}")
        return why is None

    def _best_file(self, best: Best | None) -> dict[str, Any] | None:
        """best.json: the best step so far, and its checkpoint; `saved`: the best that has one."""
        if best is None:
            return None
        made: dict[str, Any] = {
            **best,
            "metric": self.config.train.best_metric,
            "folder": _folder(best),
        }
        if self.kept is None or self.kept["step"] != best["step"]:
            made["folder"] = None
            made["saved"] = self.kept and {**self.kept, "folder": _folder(self.kept)}
        return made

    def _tell_best(self) -> None:
        if self._unsaved is not None and self.runtime.ranks.first:
            write_json(self.run_dir / "best.json", self._best_file(self._unsaved))
        self._unsaved = None

    def _tell(self, step: int, stood: float, written: str, seconds: float) -> None:
        line = f"saved checkpoints/step-{step}"
        if seconds >= TOLD_SECONDS:
            line += f" (the training stood still {stood:.1f} s{written})"
        self.note(line)

    def _note_once(self, line: str) -> None:
        if line not in self._noted:
            self._noted.add(line)
            self.note(line)


def _folder(best: Best) -> str:
    return f"checkpoints/step-{int(best['step'])}"


def _config_digest(config: RunConfig) -> str:
    """sha256 of all settings but where and how the run was started."""
    started = ("run_dir", "resume", "dry_run", "cache_dir")
    settings = {key: value for key, value in asdict(config).items() if key not in started}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
