"""Saves beside the training: what is written is the step's own, and nothing is told too early."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.durable import damage, file_digest
from dpo_cli.durable.tensors import DTYPES
from dpo_cli.errors import ConfigError, DiskError, NonFiniteError, Preempted
from dpo_cli.train import checkpoint, contents, host_copy, loop, saving
from dpo_cli.train.pace import FREE_SECONDS, MAX_SHARE, MIN_SECONDS, Pace
from small_runs import configure, metrics, train

SHORT = ("stage=sft", "optim.lr=3e-3", "data.eval_rows=0", "train.sample_prompts=0",
         "logger.report=false")  # fmt: skip
PATIENCE = 60  # seconds until a test that waits for another thread gives up


# ---------------------------------------------------------------- beside the training


class Disk:
    """Stops the n-th save before its first tensor, until it is told to go on, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: int = 1) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.error: OSError | None = None
        self.calls, self.call, self.threads = 0, call, []
        real = saving.publish

        def publish(job: Any) -> Any:
            self.calls += 1
            self.threads.append(threading.current_thread())
            if self.calls == self.call:
                self.reached.set()
                assert self.go.wait(PATIENCE)
                if self.error is not None:
                    monkeypatch.setattr(contents, "write_tensors", self._fail)
            return real(job)

        monkeypatch.setattr(saving, "publish", publish)

    def _fail(self, *rest: Any) -> Any:
        assert self.error is not None
        raise self.error


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Any]) -> None:
    """Do something before a step is trained: number of steps done -> action."""
    real = loop._train_step

    def train_step(run: Any) -> Any:
        if run.step in actions:
            actions[run.step]()
        return real(run)

    monkeypatch.setattr(loop, "_train_step", train_step)


def steps_of(run_dir: Path) -> list[int]:
    return checkpoint.steps_in(run_dir / "checkpoints")


def test_steps_go_on_while_a_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is written then is the saved step's, not the ones' that were taken since."""
    words = (*SHORT, "train.max_steps=6", "train.save_every_steps=2", "train.keep_checkpoints=9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Saves, "_has_memory", lambda self, made: False)
        train(tmp_path / "fore", *words)
    disk, seen = Disk(monkeypatch), []

    def let_go() -> None:
        assert disk.reached.wait(PATIENCE)
        seen.append(steps_of(tmp_path / "back"))
        disk.go.set()

    at_step(monkeypatch, {3: let_go})  # step 3 was taken since the save after step 2 began
    train(tmp_path / "back", *words)
    assert seen == [[]]
    assert [thread is threading.main_thread() for thread in disk.threads] == [False, False, True]
    assert steps_of(tmp_path / "back") == [2, 4, 6]
    for step in (2, 4, 6):
        fore, back = (tmp_path / name / "checkpoints" / f"step-{step}" for name in ("fore", "back"))
        assert damage(back) is None
        entries = [json.loads((f / "MANIFEST.json").read_text())["files"] for f in (fore, back)]
        assert entries[0] == entries[1]
    assert not any(t.name.startswith("dpo-run-save") for t in threading.enumerate())


def test_the_next_save_waits_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    real_wait, waited = saving.Saves.wait, []

    def wait(self: Any) -> None:
        if self.busy:
            waited.append(steps_of(tmp_path / "r"))
            disk.go.set()
        real_wait(self)

    monkeypatch.setattr(saving.Saves, "wait", wait)
    train(tmp_path / "r", *SHORT, "train.max_steps=3", "train.save_every_steps=1")
    assert waited[0] == []
    assert steps_of(tmp_path / "r") == [2, 3]


def test_a_write_error_is_raised_after_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, call=2)
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    pending: list[Any] = []
    real_save = saving.Saves.save

    def save(self: Any, step: int, best: Any, last: bool) -> None:
        real_save(self, step, best, last)
        pending[:] = [self]

    def fail() -> None:
        disk.go.set()
        assert pending[0]._pending[2].exception(PATIENCE) is not None

    monkeypatch.setattr(saving.Saves, "save", save)
    at_step(monkeypatch, {5: fail})
    words = (*SHORT, "train.max_steps=9", "train.save_every_steps=2")
    with pytest.raises(DiskError, match=r"No space left on device.*MB free") as error:
        train(tmp_path / "r", *words)
    assert error.value.exit_code == 74
    rows = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 6  # the step after the error, and none more
    assert steps_of(tmp_path / "r") == [2]
    assert checkpoint.newest_valid(tmp_path / "r" / "checkpoints").step == 2
    assert not list((tmp_path / "r" / "checkpoints").glob(".tmp-*"))
    assert not (tmp_path / "r" / "final").exists()


def test_a_signal_waits_for_the_save_under_way_and_saves_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*SHORT, "train.max_steps=6", "train.save_every_steps=2")
    train(tmp_path / "whole", *words)
    disk = Disk(monkeypatch)

    def stop() -> None:
        assert disk.reached.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGTERM)
        disk.go.set()

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, {2: stop})
        with pytest.raises(Preempted, match="SIGTERM after step 3 of 6"):
            train(tmp_path / "cut", *words)
    assert steps_of(tmp_path / "cut") == [2, 3]
    train(tmp_path / "cut", *words, "resume=true")
    final = "final/model.safetensors"
    assert file_digest(tmp_path / "whole" / final) == file_digest(tmp_path / "cut" / final)


def test_an_error_waits_for_the_save_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it tells of the last checkpoint is true, and that one is there."""
    disk = Disk(monkeypatch)

    def take_step(*args: Any) -> float:
        disk.go.set()
        raise NonFiniteError("bad gradient")

    at_step(monkeypatch, {2: lambda: monkeypatch.setattr(loop, "take_step", take_step)})
    with pytest.raises(NonFiniteError, match="step-2 is the last checkpoint"):
        train(tmp_path / "r", *SHORT, "train.max_steps=6", "train.save_every_steps=2")
    assert checkpoint.newest_valid(tmp_path / "r" / "checkpoints").step == 2


def test_without_room_for_a_copy_the_training_waits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_copy, "free_bytes", lambda: 10_000)
    disk = Disk(monkeypatch)
    disk.go.set()
    train(tmp_path / "r", *SHORT, "train.max_steps=4", "train.save_every_steps=1",
          "logger.progress=plain")  # fmt: skip
    assert {thread is threading.main_thread() for thread in disk.threads} == {True}
    told = "".join(capsys.readouterr())
    assert told.count("training waits for each save: a copy of the state needs 0.0 GiB") == 1


def test_copies_for_a_device_share_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of CUDA, without its own calls; pages are made ahead, and locked once."""
    waited: list[Any] = []
    locked: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(
        host_copy, "_lock", lambda buffer, device: locked.append(len(buffer)) or False
    )
    copies, device = host_copy.HostCopy(torch.device("cuda")), torch.device("cuda")

    def state(seed: int) -> contents.Contents:
        torch.manual_seed(seed)
        odd = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
        odd |= {"view": torch.randn(4, 6).T, "step": torch.tensor(7.0), "empty": torch.zeros(0, 2)}
        return contents.Contents({"a": b"b"}, {"w": odd, "o": {"x": torch.randn(1000)}})

    def same(a: contents.Contents, b: contents.Contents) -> bool:
        pairs = [(a.tensors[f][n], b.tensors[f][n]) for f in b.tensors for n in b.tensors[f]]
        return a.texts == b.texts and all(
            torch.equal(x, y) and x.dtype == y.dtype and x.data_ptr() != y.data_ptr()
            for x, y in pairs
            if y.numel()
        )

    copies.prepare(state(0))
    first = copies.take(state(1))
    assert same(first, state(1))
    assert len(locked) == 1
    assert waited == [device]
    buffer = copies.buffer
    assert same(copies.take(state(2)), state(2))
    assert copies.buffer is buffer
    assert not same(first, state(1))  # its room was taken
    monkeypatch.setattr(host_copy, "free_bytes", lambda: 0)
    assert copies.refusal(state(3)) is None  # the room is there
    larger = state(4) | contents.Contents({}, {"more": {"x": torch.ones(5000)}})
    assert "the host has 0.0 GiB free" in str(copies.refusal(larger))
    assert same(copies.take(larger), larger)
    copies.close()
    assert copies.buffer is None


def test_a_container_has_less_memory_than_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copy, "CGROUP", tmp_path)
    monkeypatch.setattr(host_copy, "MEMINFO", tmp_path / "meminfo")
    assert host_copy.free_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 700 kB\n")
    assert host_copy.free_bytes() == 700 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 250000\ninactive_file 40000\n")
    assert host_copy.free_bytes() == 700 * 1024
    (tmp_path / "memory.max").write_text("500000\n")
    assert host_copy.free_bytes() == 500_000 - 300_000 + 40_000


# ---------------------------------------------------------------- by time


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_saves_are_five_minutes_apart_and_take_a_fiftieth() -> None:
    clock = Clock()
    pace, saved = Pace(None, clock), []
    for _ in range(6 * 3600):
        clock.now += 1
        if pace.due(busy=False):
            saved.append(clock.now - pace.began)
            clock.now += 20  # the loop stands still
            pace.stopped(20)
    assert saved[0] == MIN_SECONDS
    elapsed = clock.now - pace.began
    assert MAX_SHARE * elapsed - 20 <= 20 * len(saved) <= MAX_SHARE * elapsed
    assert min(b - a for a, b in pairwise(saved)) >= MIN_SECONDS


def test_what_the_writer_computes_on_the_same_cores_counts() -> None:
    clock = Clock()
    pace = Pace(None, clock)
    clock.now += 1000
    pace.stopped(1.0)
    assert pace.affordable(busy=False)
    pace.written(60, taken=15)
    assert (pace.spent, pace.latest) == (16, 16)
    assert not pace.affordable(busy=False)  # 32 s of 1,000
    clock.now += 601
    assert pace.affordable(busy=False)
    assert not pace.affordable(busy=True)  # it would wait for 60 s more


def test_short_saves_are_free_and_a_set_time_is_kept() -> None:
    clock = Clock()
    pace = Pace(None, clock)
    pace.stopped(FREE_SECONDS)
    assert pace.affordable(busy=False)
    assert not pace.due(busy=False)
    every = Pace(0.5, clock)
    every.stopped(1000)
    clock.now += 29
    assert not every.due(busy=True)
    clock.now += 1
    assert every.due(busy=True)


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics(run_dir) if "loss" in row]


def test_a_set_time_saves_and_changes_nothing_else(tmp_path: Path) -> None:
    words = (*SHORT, "train.max_steps=4", "train.keep_checkpoints=9", "model.dropout=0.1")
    train(tmp_path / "often", *words, "train.save_every_minutes=1e-9")
    train(tmp_path / "rarely", *words)
    assert steps_of(tmp_path / "often") == [1, 2, 3, 4]
    assert steps_of(tmp_path / "rarely") == [4]  # five minutes have not passed
    assert losses(tmp_path / "often") == losses(tmp_path / "rarely")
    final = "final/model.safetensors"
    assert file_digest(tmp_path / "often" / final) == file_digest(tmp_path / "rarely" / final)


def test_a_best_step_is_not_saved_where_that_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """best.json names it all the same: what is the best does not depend on the clock."""
    words = (*SHORT, "data.eval_rows=12", "train.max_steps=6", "train.eval_every_steps=1")
    monkeypatch.setattr(saving.Saves, "_has_memory", lambda self, made: False)
    train(tmp_path / "cheap", *words)
    monkeypatch.setattr(Pace, "affordable", lambda self, busy: self.latest == 0.0)
    stopped = []

    def stop() -> None:
        stopped.append(json.loads((tmp_path / "dear" / "best.json").read_text()))
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_step(patch, {4: stop})
        with pytest.raises(Preempted):
            train(tmp_path / "dear", *words, "logger.progress=plain")
    told = "".join(capsys.readouterr())
    assert told.count("not every best step is saved") == 1
    assert steps_of(tmp_path / "dear") == [1, 5]  # the first, whose price was not known; SIGTERM
    at_four = stopped[0]
    assert (at_four["step"], at_four["folder"]) == (4, None)
    assert at_four["saved"]["folder"] == "checkpoints/step-1"
    train(tmp_path / "dear", *words, "resume=true")
    cheap, dear = (json.loads((tmp_path / x / "best.json").read_text()) for x in ("cheap", "dear"))
    assert cheap == dear
    assert cheap["folder"] == "checkpoints/step-6"


def test_steps_and_minutes_are_not_both_given() -> None:
    with pytest.raises(ConfigError, match=r"train\.save_every_minutes=5\.0: has no effect"):
        configure("stage=sft", "train.save_every_minutes=5", "train.save_every_steps=10")
