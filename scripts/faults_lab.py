"""Where faults are injected: small runs as processes of their own, and what is left of them.

`Lab.dpo` starts a fresh `python -m dpo_cli`. `Lab.forked` runs the same command in a fork of
this process, which has torch imported already and can be given a fault to install first; a
fork dies of SIGKILL as any process does.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "model=tiny", "model.architecture.layers=2", "model.architecture.hidden=32",
    "model.architecture.heads=2", "data.rows=48", "data.eval_rows=8", "train.batch_size=8",
    "logger.progress=plain", "logger.tensorboard=false", "logger.plots=false",
    "logger.report=false", "hardware=cpu", "train.sample_prompts=0",
)  # fmt: skip
OVER = tuple(w for w in TINY if not w.startswith("model.arch"))  # with model.path
SFT = (*TINY, "stage=sft", "optim.lr=3e-3")
PPO = (
    "stage=ppo-baseline", "stage.rollout_samples=8", "train.batch_size=4", "stage.ppo_epochs=1",
    "stage.max_new_tokens=4", "stage.normalise_prompts=8", "stage.eval_prompts=4",
    "stage.no_eos_score=null", "reward_fn=length", "stage.kl_control=adaptive",
    "stage.target_kl=0.5", "stage.kl_horizon=64",
)  # fmt: skip
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
}  # fmt: skip
PRELOADED = ("dpo_cli", "torch", "transformers", "safetensors", "hydra", "omegaconf", "tokenizers")


class Failed(Exception):
    """What was seen where something else was required."""


def check(ok: object, seen: str) -> None:
    if not ok:
        raise Failed(seen)


@dataclass(frozen=True)
class Done:
    """How a process ended: its exit code (-N: by signal N), all it printed, wall time."""

    code: int
    told: str
    seconds: float

    @property
    def last(self) -> str:
        """Its error line, or the last one, for a table's cell."""
        lines = self.told.strip().splitlines() or ["nothing printed"]
        return next((line for line in lines if line.startswith("error:")), lines[-1])[:160]


@dataclass
class Lab:
    folder: Path
    kills: int = 20
    seed: int = 0
    selected: list[str] = field(default_factory=list)  # numbers of the cases to run
    outcomes: dict[str, str] = field(default_factory=dict)  # of tests, see faults_tests.py
    made: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ.update(OFFLINE)
        os.environ["DPO_RUN_CACHE"] = str(self.folder / "cache")
        path = [str(ROOT), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))

    def fresh(self, name: str) -> Path:
        """A path in the lab where nothing is."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def copy(self, run: Path, name: str) -> Path:
        """A run folder again, under another name."""
        target = self.fresh(name)
        shutil.copytree(run, target, symlinks=True)
        return target

    # ------------------------------------------------------------ processes

    def start(self, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """`python -m dpo_cli <words>` in a session of its own, so that all of it can be killed."""
        return self.python(["-m", "dpo_cli", *words], env)

    def python(self, words: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        out = (self.folder / "out.txt").open("w+")
        child = subprocess.Popen(
            [sys.executable, *words], cwd=self.folder, env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        child.out, child.began = out, time.monotonic()  # type: ignore[attr-defined]
        return child

    def wait(self, child: subprocess.Popen[str], seconds: float = 300) -> Done:
        """Its end; whatever still runs after so many seconds is killed and told as code -9."""
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill_all(child)
            code = child.wait()
        took = time.monotonic() - child.began  # type: ignore[attr-defined]
        out = child.out  # type: ignore[attr-defined]
        out.seek(0)
        told = out.read()
        out.close()
        return Done(code, told, took)

    def dpo(self, *words: str) -> Done:
        return self.wait(self.start(*words))

    def forked(
        self, *words: str, fault: Callable[[], None] | None = None, seconds: float = 120
    ) -> Done:
        """`dpo-run <words>` in a fork, after `fault()`."""
        self.preload()
        return self._fork(list(words), fault, seconds)

    def _fork(self, words: list[str], fault: Callable[[], None] | None, seconds: float) -> Done:
        out, began = self.folder / "fork.txt", time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        if (pid := os.fork()) == 0:
            _child(words, fault, out, self.folder)
        code = _waited(pid, began + seconds)
        return Done(code, out.read_text(errors="replace"), time.monotonic() - began)

    def preload(self) -> None:
        """Import here, once, what a run imports, so that forks need not."""
        if "preload" in self.made:
            return
        names, run = self.folder / "modules.json", self.fresh("preload")
        self.made["preload"] = run

        def list_modules() -> None:
            from dpo_cli import run

            real = run.finish

            def finish(*args: Any) -> Any:
                names.write_text(json.dumps(sorted(sys.modules)))
                return real(*args)

            run.finish = finish

        words = [*SFT, "train.max_steps=1", f"run_dir={run}"]
        done = self._fork(words, list_modules, 300)
        check(done.code == 0, f"a run without a fault ended with {done.code}: {done.last}")
        for name in json.loads(names.read_text()):
            if name.partition(".")[0] in PRELOADED and not name.endswith("__main__"):
                importlib.import_module(name)

    # ------------------------------------------------------------ runs that others start from

    def whole(self, name: str, *words: str) -> Path:
        """An uninterrupted run, made once."""
        if name not in self.made:
            run = self.fresh(f"whole-{name}")
            done = self.forked(*words, f"run_dir={run}")
            check(done.code == 0, f"the uninterrupted {name} ended with {done.code}: {done.last}")
            self.made[name] = run
        return self.made[name]

    def base(self) -> Path:
        """A policy to start from."""
        return self.whole("base", *SFT, "train.max_steps=12")


def until(seen: Callable[[], object], child: subprocess.Popen[str], seconds: float = 180) -> None:
    """Wait until something is seen of a process, or it has ended."""
    deadline = time.monotonic() + seconds
    while not seen() and child.poll() is None:
        if time.monotonic() > deadline:
            kill_all(child)
            raise Failed(f"nothing seen of a start for {seconds:.0f} s")
        time.sleep(0.005)


def kill_all(child: subprocess.Popen[str]) -> None:
    """kill -9 of a process and all that it started: parents first, who could start more."""
    pids = [child.pid]
    for pid in pids:
        pids += children(pid)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def children(pid: int) -> list[int]:
    """Of a process, in the order they were started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = stat.read_text().partition(" ")
        except OSError:  # it has ended
            continue
        if int(rest.rpartition(")")[2].split()[1]) == pid:
            found.append(int(number))
    return sorted(found)


def _waited(pid: int, deadline: float) -> int:
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _child(words: list[str], fault: Callable[[], None] | None, out: Path, cwd: Path) -> NoReturn:
    import traceback

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
    except BaseException:  # noqa: BLE001 - a child must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(
            code
        )  # what its parent registered for the end, such as removing the lab, is not due


# ---------------------------------------------------------------- what is left of a run


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
    """Published checkpoints."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in found)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without a line that is being written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]
