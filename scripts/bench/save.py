"""The cost of saving: how long training is blocked, compared with plain writes of the same tensors.

plain: two safetensors files, weights and optimizer state, without fsync or checksum. synced: the
same with an fsync of each. hashed: as plain, with each file's sha256 computed while writing.
foreground: a checkpoint published while training waits. copy: the part of a background save that
blocks training. background: that copy, published by a thread. They are measured in turn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_cli.config import OptimConfig
from dpo_cli.durable import damage
from dpo_cli.durable.tensors import write_tensors
from dpo_cli.grammar.tokenizer import build_tokenizer
from dpo_cli.train import checkpoint, contents, loop
from dpo_cli.train.host_copy import HostCopy
from dpo_cli.train.optim import build_optimizer, take_step
from dpo_cli.train.runtime import quiet_libraries
from scripts.bench import options
from scripts.bench.page import table

ROUNDS, WARM_UP = 3, 2  # of the small runs, in turn; steps not counted
RUN = (
    "model=tiny", "hardware=cpu", "data.rows=256", "data.eval_rows=0", "stage=sft",
    "train.eval_every_steps=0", "train.sample_prompts=0", "logger.progress=off",
    "logger.tensorboard=false", "logger.plots=false", "logger.report=false",
)  # fmt: skip


def trained(layers: int, width: int, vocab: int, device: str = "cpu") -> tuple[Any, Any]:
    """A model after one step, so that its optimizer has state."""
    config = GPT2Config(vocab_size=vocab, n_embd=width, n_layer=layers, n_head=4, n_positions=64,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config).to(device)
    optimizer = build_optimizer(model, OptimConfig(), 1e-3)
    ids = torch.randint(0, vocab, (1, 16), device=device)
    model(input_ids=ids, labels=ids).loss.backward()
    take_step(model, optimizer, 1.0, 1.0, 1e-3)
    return model, optimizer


def plain_writer(
    model: Any, optimizer: Any, synced: bool, write_file: Callable[..., object] = save_file
) -> Callable[[Path], None]:
    weights = {name: value.detach() for name, value in model.named_parameters()}
    state = {f"{index}/{key}": value for index, entry in optimizer.state_dict()["state"].items()
             for key, value in entry.items() if isinstance(value, torch.Tensor)}  # fmt: skip

    def write(folder: Path) -> None:
        folder.mkdir()
        for name, tensors in (("model", weights), ("optimizer", state)):
            path = folder / f"{name}.safetensors"
            write_file(tensors, path)
            if synced:
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())

    return write


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def methods_of(args: argparse.Namespace) -> dict[str, Callable[[Path], object]]:
    """Name -> function that writes into a new folder; `background` writes the data of `copy`."""
    model, optimizer = trained(args.layers, args.width, args.vocab, args.device)
    tokenizer = contents.of_tokenizer(build_tokenizer(args.vocab))
    host, copies = HostCopy(torch.device(args.device)), []

    def new_contents() -> contents.Contents:
        weights = contents.of_model(model, tokenizer, {})
        return weights | contents.of_training(optimizer, None, checkpoint.state_json(1, {}))

    def hashed(tensors: Any, path: Path) -> None:
        write_tensors(path, tensors)

    def background(folder: Path) -> None:
        thread = threading.Thread(target=checkpoint.publish, args=(folder, 1, copies.pop()))
        thread.start()
        thread.join()

    return {
        "plain": plain_writer(model, optimizer, synced=False),
        "synced": plain_writer(model, optimizer, synced=True),
        "hashed": plain_writer(model, optimizer, synced=False, write_file=hashed),
        "foreground": lambda folder: checkpoint.publish(folder, 1, new_contents()),
        "copy": lambda folder: copies.append(host.take(new_contents())),
        "background": background,
    }


def measure(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, list[float]], float]:
    """Seconds per method, and MB per checkpoint."""
    methods = methods_of(args)
    seconds_of: dict[str, list[float]] = {name: [] for name in methods}
    size = 0.0
    for turn in range(args.repeats + 1):  # the first is a warm-up
        for name, write in methods.items():
            folder = scratch / f"{name}-{turn}"
            seconds = timed(lambda write=write, folder=folder: write(folder))
            if turn:
                seconds_of[name].append(seconds)
            if name in ("foreground", "background"):
                assert damage(folder / "step-1") is None
                size = sum(p.stat().st_size for p in (folder / "step-1").iterdir()) / 2**20
            shutil.rmtree(folder, ignore_errors=True)  # a copy is in none
    return seconds_of, size


def steps(scratch: Path, count: int) -> tuple[float, float, float]:
    """Medians of a small run's steps: seconds of a step without saves, of the loop's work after it,
    and of a step if every tenth is saved."""
    from dpo_cli.cli import main as dpo_run

    real_step, real_after = loop._train_step, loop._after_step
    taken: dict[int, list[float]] = {0: [], 10: []}
    idle: list[float] = []

    def train_step(run: Any) -> dict[str, float]:
        values = real_step(run)
        if run.step > WARM_UP:
            taken[run.config.train.save_every_steps].append(values["step_seconds"])
        return values

    def after_step(run: Any, *rest: Any) -> None:
        seconds = timed(lambda: real_after(run, *rest))
        if run.config.train.save_every_steps == 0 and run.step < count:
            idle.append(seconds)

    loop._train_step, loop._after_step = train_step, after_step
    try:
        for turn in range(ROUNDS):
            for every in taken:
                folder = scratch / f"run-{turn}-{every}"
                saving = (f"train.save_every_steps={every}", f"run_dir={folder}")
                dpo_run([*RUN, f"train.max_steps={count}", *saving])
    finally:
        loop._train_step, loop._after_step = real_step, real_after
    return tuple(map(statistics.median, (taken[0], idle, taken[10])))


def own_parser() -> argparse.ArgumentParser:
    sizes = {"layers": 4, "width": 256, "vocab": 1024, "repeats": 15, "steps": 60}
    words = {name: {"type": int, "default": value, "help": f"default: {value}"}
             for name, value in sizes.items()}  # fmt: skip
    return options.parser(__doc__, groups=(), more=words | {
        "device": {"default": "cpu", "help": "of the state; default: cpu"},
        "folder": {"type": Path, "help": "on the disk to measure; default: a temporary"},
    })  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Print the cost of each method; returns an exit code."""
    p = own_parser()
    args = p.parse_args(argv)
    if args.repeats < 1 or args.steps < 10:
        p.error("--repeats: at least 1; --steps: at least 10")
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="dpo-run-save-", dir=args.folder) as name:
        seconds_of, size = measure(args, Path(name))
        plain = statistics.median(seconds_of["plain"])
        rows = [["way", "median s", "lowest", "highest", "MB/s", "times plain"]]
        for method, seconds in seconds_of.items():
            median = statistics.median(seconds)
            rows.append([method, *(f"{x:.4f}" for x in (median, min(seconds), max(seconds))),
                         f"{size / median:,.0f}", f"{median / plain:.1f}"])  # fmt: skip
        print(f"A checkpoint of {size:.1f} MB, {args.repeats} times each:\n")
        print("\n".join(table(rows)))
        step, idle, between = steps(Path(name), args.steps)
    print(f"\nA step of the tiny model: {step * 1e3:.1f} ms; the loop's work after a step "
          f"without a save: {idle * 1e6:.0f} µs. With a save every ten steps a step takes "
          f"{between * 1e3:.1f} ms.")  # fmt: skip
    return 0
