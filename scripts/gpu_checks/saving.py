"""Step 13: how long saving blocks training, how long loading takes, and the estimated memory."""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dpo_cli.config import ModelConfig, RunConfig
from dpo_cli.grammar.tokenizer import build_tokenizer
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.load import load_model, load_tokenizer
from dpo_cli.plan.dry_run import plan_tables
from dpo_cli.run import run
from dpo_cli.train import loop
from scripts.common import resident_mb
from scripts.gpu_checks.exactness import LARGE, SMALL, random_gpt2
from scripts.gpu_checks.facts import Fact, Setup, Skip
from scripts.measuring import compose

SAVED, STEPS = 16, 20  # a checkpoint in between, which allocates its copy, and one at the end
SEVEN_WIDTH = 4096  # of Mistral 7B
VOCAB = 1024  # of the generated reviews


def check(setup: Setup) -> Iterator[Fact]:
    folder = setup.folder("saving")
    write_model(setup, folder / "model")
    yield from loading(setup, "load, s", folder / "model")
    if not setup.small:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = configured(setup, folder)
    estimated = [value for name, value in plan_tables(config)[1] if name.startswith("total per")]
    yield "memory, estimated", str((estimated or ["no estimate"])[0])
    with watching() as seen:
        run(config, ["dpo-run"])
        ended = time.monotonic()
    if not setup.small:
        yield "memory, measured, GiB", torch.cuda.max_memory_allocated() / 2**30
    gaps = {step: seen[step + 1] - seen[step] for step in range(1, STEPS)}
    plain = statistics.mean(gaps[step] for step in range(2, SAVED))
    yield "step, s", plain
    yield "checkpoint, s of the loop", max(0.0, gaps[SAVED] - plain)
    yield "step after it, s", statistics.mean(gaps[step] for step in range(SAVED + 1, STEPS))
    yield "from the last step to the end, s", ended - seen[STEPS]
    yield "checkpoint, GB", size(newest(folder / "run" / "checkpoints")) / 1e9
    shutil.rmtree(folder)  # two checkpoints of 9 GB


def seven(setup: Setup) -> Iterator[Fact]:
    """Step 17: the same with the weights of the 7B benchmark."""
    configs = [path for path in setup.folder("bench").glob("made-*/model/config.json")
            if json.loads(path.read_text()).get("hidden_size") == SEVEN_WIDTH]  # fmt: skip
    if not configs:
        raise Skip("there is no 7B model of the benchmark (steps 10, 11, 16)")
    yield from loading(setup, "load, s", configs[0].parent)


def write_model(setup: Setup, folder: Path) -> None:
    shape = SMALL | {"vocab_size": VOCAB, "n_positions": 256} if setup.small else LARGE
    random_gpt2(shape, torch.device(setup.device)).save_pretrained(folder)
    build_tokenizer(VOCAB).save_pretrained(folder)


def loading(setup: Setup, name: str, folder: Path) -> Iterator[Fact]:
    """Load a policy as in a run, probed and on its device, and measure time and host memory."""
    before, start = resident_mb("VmRSS"), time.monotonic()
    source = ModelConfig(path=str(folder))
    dtype = torch.float32 if setup.small else torch.bfloat16
    on = Placement(torch.device(setup.device), dtype, print)
    model = load_model(source, load_tokenizer(source), on=on)
    model.to(setup.device)
    if not setup.small:
        torch.cuda.synchronize()
    yield name, time.monotonic() - start
    yield name.replace(", s", ", GiB of the host"), max(0.0, resident_mb("VmHWM") - before) / 1024


def configured(setup: Setup, folder: Path) -> RunConfig:
    return compose([
        "stage=dpo", "model=custom", f"model.path={folder / 'model'}", "data=sentiment",
        "data.rows=64", "data.eval_rows=0", "train.batch_size=4", f"train.max_steps={STEPS}",
        f"train.save_every_steps={SAVED}", "train.eval_every_steps=0", "train.sample_prompts=0",
        "logger=none", "logger.progress=off", f"hardware={setup.device}",
        f"run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}",
    ])  # fmt: skip


@contextmanager
def watching() -> Iterator[dict[int, float]]:
    """When each step was done, without the time of its checkpoint."""
    seen: dict[int, float] = {}
    real = loop._train_step

    def train_step(run: Any) -> dict[str, float]:
        values = real(run)
        seen[run.step] = time.monotonic()
        return values

    with mock.patch.object(loop, "_train_step", train_step):
        yield seen


def newest(folder: Path) -> Path:
    return max(folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
