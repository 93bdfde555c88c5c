"""Step 13: what saving stops training for, how long loading takes, what memory was estimated."""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
import torch

from dpo_cli.compose import prepare
from dpo_cli.config import ModelConfig, RunConfig
from dpo_cli.grammar.tokenizer import build_tokenizer
from dpo_cli.model.attention import Placement
from dpo_cli.model.load import load_model, load_tokenizer
from dpo_cli.paths import conf_dir
from dpo_cli.plan import plan_tables
from dpo_cli.run import run
from scripts.gpu_checks.exactness import LARGE, SMALL, random_gpt2
from scripts.gpu_checks.facts import Fact, Setup, Skip

SAVED, STEPS = 16, 20  # a checkpoint in between, when room for its copy is made; one at the end
LOOK = 0.005  # seconds between two looks at metrics.jsonl
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
    estimated = [value for name, value in plan_tables(config)[1] if name.startswith("in all")]
    yield "memory, estimated", str((estimated or ["no estimate"])[0])
    with watching(folder / "run" / "metrics.jsonl") as seen:
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
    """Step 17: the weights that the benchmark of a 7B model has left."""
    made = [path for path in setup.folder("bench").glob("made-*/model/config.json")
            if json.loads(path.read_text()).get("hidden_size") == SEVEN_WIDTH]  # fmt: skip
    if not made:
        raise Skip("the benchmark has left no 7B model (steps 10, 11, 16)")
    yield from loading(setup, "load, s", made[0].parent)


def write_model(setup: Setup, folder: Path) -> None:
    shape = SMALL | {"vocab_size": VOCAB, "n_positions": 256} if setup.small else LARGE
    random_gpt2(shape, torch.device(setup.device)).save_pretrained(folder)
    build_tokenizer(VOCAB).save_pretrained(folder)


def loading(setup: Setup, name: str, folder: Path) -> Iterator[Fact]:
    """As a run loads a policy, probed and on its device; and the host memory that this took."""
    before, began = resident("VmRSS"), time.monotonic()
    source = ModelConfig(path=str(folder))
    dtype = torch.float32 if setup.small else torch.bfloat16
    on = Placement(torch.device(setup.device), dtype, print)
    model = load_model(source, load_tokenizer(source), on=on)
    model.to(setup.device)
    if not setup.small:
        torch.cuda.synchronize()
    yield name, time.monotonic() - began
    yield name.replace(", s", ", GiB of the host"), max(0.0, resident("VmHWM") - before)


def configured(setup: Setup, folder: Path) -> RunConfig:
    words = [
        "stage=dpo", "model=custom", f"model.path={folder / 'model'}", "data=sentiment",
        "data.rows=64", "data.eval_rows=0", "train.batch_size=4", f"train.max_steps={STEPS}",
        f"train.save_every_steps={SAVED}", "train.eval_every_steps=0", "train.sample_prompts=0",
        "logger=none", "logger.progress=off", f"hardware={setup.device}",
        f"run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return prepare(hydra.compose("config", overrides=words), words)


@contextmanager
def watching(path: Path) -> Iterator[dict[int, float]]:
    """When each step was logged, looked at from outside."""
    seen: dict[int, float] = {}
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(LOOK):
            lines = path.read_text().splitlines() if path.is_file() else []
            for line in lines[len(seen) :]:
                note(line, seen)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        time.sleep(2 * LOOK)
        stop.set()
        thread.join()


def note(line: str, seen: dict[int, float]) -> None:
    """A line that is half written is read again."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return
    if "loss" in row:
        seen.setdefault(int(row["step"]), time.monotonic())


def newest(folder: Path) -> Path:
    return max(folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resident(field: str) -> float:
    """GiB of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{field}:")) / 2**20
