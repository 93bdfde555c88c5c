"""Step 4: the command itself with small models: exit codes, and losses compared with each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.common import metrics_of
from scripts.gpu_checks.facts import Fact, Setup

COMMON = ("logger=none", "logger.progress=plain", "data=sentiment", "data.rows=256",
          "data.eval_rows=16")  # fmt: skip
TRAINING = ("train.batch_size=8", "train.eval_every_steps=0", "train.save_every_steps=0",
            "train.max_steps=12")  # fmt: skip
SAMPLES = ("train.sample_prompts=1", "train.sample_max_new_tokens=4")
READ = {  # stage -> the words that it reads
    "sft": (*COMMON, *TRAINING, *SAMPLES), "dpo": (*COMMON, *TRAINING, *SAMPLES),
    "ppo-baseline": (*COMMON, *TRAINING, *SAMPLES), "reward": (*COMMON, *TRAINING),
    "sample": COMMON, "evaluate": COMMON,
}  # fmt: skip
FEW = ("data.rows=16", "data.eval_rows=2", "train.max_steps=2", "train.sample_prompts=0")
LONG = 120  # steps of the run that is interrupted
COMPARED = 12  # steps: rounding that differs grows with every step
SAVE_EVERY = 10
STOPPED = 75  # exit code of a run that a signal has stopped and that has saved
RATE = "optim.lr=1e-4"


@dataclass
class Runs:
    """Run folders of one device under one folder; codes: of the finished commands."""

    setup: Setup
    folder: Path
    codes: dict[str, int] = field(default_factory=dict)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "dpo_cli", *words]

    def words(self, name: str, stage: str, *words: str) -> list[str]:
        run = [f"stage={stage}", f"run_dir={self.folder / name}", f"hardware={self.setup.device}"]
        return [*READ[stage], *run, *(FEW if self.setup.small else ()), *words]

    def start(self, name: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as log:
            return subprocess.Popen(
                self.command(*words), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "2"},
            )  # fmt: skip

    def log(self, name: str) -> Path:
        """Named so that the script includes it in its own log."""
        return Path(self.setup.work, f"step-4-{name}.log")

    def losses(self, name: str) -> dict[int, float]:
        rows = metrics_of(self.folder / name)
        return {row["step"]: row["loss"] for row in rows if "loss" in row}


def check(setup: Setup) -> Iterator[Fact]:
    runs = Runs(setup, setup.folder("commands"))
    yield from together(runs, first_runs(setup))
    yield from together(runs, second_runs(setup, runs))
    yield "dpo: losses", " ".join(f"{x:.4f}" for x in list(runs.losses("dpo").values())[:6])
    if setup.small:
        yield "dpo: first loss", runs.losses("dpo").get(1, float("nan"))
        return
    yield "resume: exit code of the interrupted run", runs.codes.get("interrupted", -1) - STOPPED
    for name in ("dpo", "lora", "qlora", "checkpointing", "compile"):
        yield f"{name}: first loss", runs.losses(name).get(1, float("nan"))
    for name, other in (("interrupted", "long"), ("checkpointing", "dpo"), ("compile", "dpo")):
        first = SAVE_EVERY if name == "interrupted" else 0
        yield f"{name}: losses, largest difference", apart(runs, name, other, first)
    yield f"interrupted: steps of {LONG}", len(runs.losses("interrupted"))


def together(runs: Runs, jobs: dict[str, list[str]]) -> Iterator[Fact]:
    """Run all commands at once. The one named `interrupted` is interrupted, then resumed."""
    running = {name: runs.start(name, runs.words(name, *words)) for name, words in jobs.items()}
    if "interrupted" in running:
        runs.codes["interrupted"] = interrupt(runs, running.pop("interrupted"))
        running["resume"] = runs.start("resume", [f"resume={runs.folder / 'interrupted'}"])
    for name, process in running.items():
        runs.codes[name] = process.wait()
        yield f"{name}: exit code", runs.codes[name]
        if runs.codes[name]:
            yield f"{name}: said", last_line(runs, name)


def last_line(runs: Runs, name: str) -> str:
    """The error line of a command, or its last line."""
    lines = runs.log(name).read_text(errors="replace").strip().splitlines() or ["nothing"]
    return next((line for line in lines if line.startswith("error:")), lines[-1])[:300]


def first_runs(setup: Setup) -> dict[str, list[str]]:
    sft = {"sft": ["sft", "model=tiny"]}
    reward = ["reward", "model=tiny", "stage.normalize_prompts=16",
              "stage.normalize_max_new_tokens=8"]  # fmt: skip
    return sft if setup.small else sft | {"reward": reward}


def second_runs(setup: Setup, runs: Runs) -> dict[str, list[str]]:
    """Commands that start from the results of the first ones."""
    policy = f"model.path={runs.folder / 'sft'}"
    dpo = ["dpo", "model=custom", policy, RATE]
    if setup.small:
        return {"dpo": dpo}
    long = [*dpo, f"train.max_steps={LONG}", f"train.save_every_steps={SAVE_EVERY}"]
    ppo = ["ppo-baseline", "model=custom", policy, "stage.rollout_samples=16", "stage.ppo_epochs=2",
           "stage.max_new_tokens=12", "stage.eval_prompts=8", "stage.normalize_prompts=16",
           "reward_fn=reward_model", f"reward_fn.path={runs.folder / 'reward'}"]  # fmt: skip
    few = ["stage.max_new_tokens=8"]
    return {
        "dpo": dpo, "long": long, "interrupted": long, "ppo-baseline": ppo,
        "lora": [*dpo, "lora=lora"], "qlora": [*dpo, "lora=qlora"],
        "checkpointing": [*dpo, "hardware.activation_checkpointing=1"],
        "compile": [*dpo, "hardware.compile=blocks"],
        "sample": ["sample", "model=custom", policy, "stage.prompts=16",
                   "stage.eval_prompts=4", *few],
        "evaluate": ["evaluate", "model=custom", policy, "stage.prompts=16",
                     "stage.reference_samples=16", "stage.best_of=[1,4]", *few,
                     f"stage.reference={runs.folder / 'sft'}"],
    }  # fmt: skip


def interrupt(runs: Runs, process: subprocess.Popen[bytes]) -> int:
    """SIGTERM after the first checkpoint; returns the exit code."""
    first = runs.folder / "interrupted" / "checkpoints" / f"step-{SAVE_EVERY}"
    while process.poll() is None and not first.is_dir():
        time.sleep(0.01)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    return process.wait()


def apart(runs: Runs, name: str, other: str, first: int) -> float:
    """Largest difference of the losses after step `first`; infinity if a run has none."""
    losses, others = runs.losses(name), runs.losses(other)
    steps = [step for step in sorted(losses) if first < step <= first + COMPARED and step in others]
    return max((abs(losses[s] - others[s]) for s in steps), default=float("inf"))
