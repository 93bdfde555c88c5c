"""The environment of fault injection: small runs in separate processes, and their folders.

`Lab.dpo` starts a new `python -m dpo_cli`. `Lab.forked` runs the same command in a fork of this
process, which has imported torch and can install a fault first; SIGKILL ends a fork like any
process.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from scripts.common import environment
from scripts.processes import Process

TINY = (
    "model=tiny", "model.architecture.layers=2", "model.architecture.hidden=32",
    "model.architecture.heads=2", "data.rows=48", "data.eval_rows=8", "train.batch_size=8",
    "logger.progress=plain", "logger.tensorboard=false", "logger.plots=false",
    "logger.report=false", "hardware=cpu", "train.sample_prompts=0",
)  # fmt: skip
OVER = tuple(w for w in TINY if not w.startswith("model.arch"))  # with model.path
UNTRAINED = tuple(w for w in OVER if not w.startswith("train."))  # for stages that only read
SFT = (*TINY, "stage=sft", "optim.lr=3e-3")
SAVES = (*SFT, "train.max_steps=3", "train.save_every_steps=1", "train.eval_every_steps=1")
PPO = (
    "stage=ppo-baseline", "stage.rollout_samples=8", "train.batch_size=4", "stage.ppo_epochs=1",
    "stage.max_new_tokens=4", "stage.normalize_prompts=8", "stage.eval_prompts=4",
    "stage.no_eos_score=null", "reward_fn=length", "stage.kl_control=adaptive",
    "stage.target_kl=0.5", "stage.kl_horizon=64",
)  # fmt: skip
PRELOADED = ("dpo_cli", "torch", "transformers", "safetensors", "hydra", "omegaconf", "tokenizers")
Fault = Callable[[], object]  # installs it, in the process under test


class Failed(Exception):
    """The observed outcome differs from the required one."""


def check(ok: object, seen: str) -> None:
    if not ok:
        raise Failed(seen)


@dataclass(frozen=True)
class Done:
    """How a process ended: exit code (-N: by signal N), its complete output, wall time."""

    code: int
    output: str
    seconds: float

    @property
    def last(self) -> str:
        """The error line, or the last line, for a cell of the table."""
        lines = self.output.strip().splitlines() or ["nothing printed"]
        return next((line for line in lines if line.startswith("error:")), lines[-1])[:160]

    def must(self, code: int | None, what: str = "", *output: str) -> Done:
        """Returns itself; raises Failed for another exit code (None: any is accepted), or if
        `output` was not printed."""
        name = f"{what}: " if what else ""
        check(code in (None, self.code), f"{name}exit {self.code}: {self.last}")
        for text in output:
            check(text in self.output, f"{name}`{text}` not printed: {self.output.strip()[-200:]}")
        return self


@dataclass
class Lab:
    """folder: of all its files. kills: per loop. shared: name -> run that cases start from."""

    folder: Path
    kills: int = 20
    seed: int = 0
    selected: list[str] = field(default_factory=list)  # numbers of the cases to run
    outcomes: dict[str, str] = field(default_factory=dict)  # of tests, see covered.py
    shared: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ.update(environment(self.folder, threads=1))

    def fresh(self, name: str) -> Path:
        """A path in the lab that does not exist yet."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def copy(self, run: Path, name: str) -> Path:
        """Copy a run folder to a new name."""
        target = self.fresh(name)
        shutil.copytree(run, target, symlinks=True)
        return target

    # ------------------------------------------------------------ processes

    def start(self, *words: str) -> Process:
        """`python -m dpo_cli <words>`, in its own session, so that its children can be killed."""
        return self.python("-m", "dpo_cli", *words)

    def python(self, *words: str) -> Process:
        out = self.folder / "out.txt"
        out.unlink(missing_ok=True)
        return Process([sys.executable, *words], out, os.environ, self.folder)

    def wait(self, child: Process, seconds: float = 300) -> Done:
        """Wait for its end; after the timeout, kill all its processes and report code -9."""
        code = child.wait(seconds)
        output = child.log.read_text(errors="replace")
        return Done(-signal.SIGKILL if code is None else code, output, child.seconds)

    def dpo(self, *words: str, code: int | None = 0, what: str = "") -> Done:
        """`dpo-run <words>`, which must end with this code."""
        return self.wait(self.start(*words)).must(code, what)

    def forked(
        self, *words: str, fault: Fault | None = None, code: int | None = 0, what: str = "",
        output: Sequence[str] = (),
    ) -> Done:  # fmt: skip
        """`dpo-run <words>` in a fork, after `fault()`; other arguments as in `Done.must`."""
        self.preload()
        return self._fork(list(words), fault, 120).must(code, what, *output)

    def _fork(self, words: list[str], fault: Fault | None, seconds: float) -> Done:
        out, start = self.folder / "fork.txt", time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        if (pid := os.fork()) == 0:
            _child(words, fault, out, self.folder)
        code = _waited(pid, start + seconds)
        return Done(code, out.read_text(errors="replace"), time.monotonic() - start)

    def preload(self) -> None:
        """Import a run's modules once in this process, so that forks do not have to."""
        if "preload" in self.shared:
            return
        names, run = self.folder / "modules.json", self.fresh("preload")
        self.shared["preload"] = run

        def list_modules() -> None:
            from dpo_cli import run

            def finish(real: Any, *args: Any) -> Any:
                names.write_text(json.dumps(sorted(sys.modules)))
                return real(*args)

            around(run, "finish", finish)

        words = [*SFT, "train.max_steps=1", f"run_dir={run}"]
        self._fork(words, list_modules, 300).must(0, "a run without a fault")
        for name in json.loads(names.read_text()):
            if name.partition(".")[0] in PRELOADED and not name.endswith("__main__"):
                importlib.import_module(name)

    # ------------------------------------------------------------ runs that others start from

    def once(self, name: str, words: Sequence[str], start: Callable[..., Done]) -> Path:
        """The folder of an uninterrupted run, created by `start(*words)` the first time."""
        if name not in self.shared:
            run = self.fresh(f"whole-{name}")
            start(*words, f"run_dir={run}", what=f"{name}, no fault")
            self.shared[name] = run
        return self.shared[name]

    def uninterrupted(self, name: str, *words: str) -> Path:
        """An uninterrupted run."""
        return self.once(name, words, self.forked)

    def saves(self) -> Path:
        """A run with checkpoints 2 and 3 of 3."""
        return self.uninterrupted("saves", *SAVES)

    def base(self) -> Path:
        """A policy to start from."""
        return self.uninterrupted("base", *SFT, "train.max_steps=12")

    def cut(self, run: Path, name: str, *steps: int) -> Path:
        """A copy of a run without the final model and without the checkpoints of these steps."""
        results = self.copy(run, name)
        shutil.rmtree(results / "final")
        for step in steps:
            shutil.rmtree(checkpoint(results, step))
        return results

    def resumes(self, run: Path, truth: Path, *words: str, what: str = "", after: int = -1) -> Done:
        """Resume a run, which must succeed with the final weights of `truth`. after: the step it
        must resume after; -1: any."""
        output = [f"resuming after step {after} "] if after >= 0 else []
        done = self.forked(f"resume={run}", *words, what=what or "resume", output=output)
        check(same_final(run, truth), f"{what}: final weights differ".removeprefix(": "))
        return done


def around(module: Any, name: str, function: Callable[..., Any]) -> None:
    """Replace `module.name(...)` by `function(real, ...)`, in the process under test."""
    real = getattr(module, name)
    setattr(module, name, lambda *args, **options: function(real, *args, **options))


def until(seen: Callable[[], object], child: Process, seconds: float = 180) -> None:
    """Wait until a condition holds for a process, or it has ended."""
    deadline = time.monotonic() + seconds
    while not seen() and child.running():
        if time.monotonic() > deadline:
            child.end()
            raise Failed(f"the condition did not hold within {seconds:.0f} s")
        time.sleep(0.005)


def _waited(pid: int, deadline: float) -> int:
    while True:
        results, status = os.waitpid(pid, os.WNOHANG)
        if results:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _child(words: list[str], fault: Fault | None, out: Path, cwd: Path) -> NoReturn:
    """Ends by `os._exit`: exit handlers of the parent, which remove the lab, must not run."""
    code = 1
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(cwd)
        from dpo_cli.cli import main

        if fault is not None:
            fault()
        main(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - a child must not continue as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------- results of a run


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def final_digest(run: Path) -> str:
    """sha256 of all weights that a run published."""
    files = sorted((run / "final").glob("*.safetensors"))
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode())
        total.update(path.read_bytes())
    return total.hexdigest() if files else "no final weights"


def same_final(run: Path, truth: Path) -> bool:
    return (truth / "final").is_dir() and final_digest(run) == final_digest(truth)


def steps_of(run: Path) -> list[int]:
    """Steps of the published checkpoints."""
    results = (run / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in results)
