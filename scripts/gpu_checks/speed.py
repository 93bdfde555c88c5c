"""Steps 7 to 11, 14 and 16: the benchmark's own workers, one command per side."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.common import ROOT
from scripts.gpu_checks.facts import Fact, Setup, Skip

LARGE = ("--preset=gpt2-large", "--batch=64", "--steps=6", "--warmup=2")
SEVEN = ("--preset=mistral-7b", "--batch=16", "--steps=6", "--warmup=2")
SMALL = ("--preset=tiny4x256", "--layers=1", "--width=32", "--heads=2", "--vocab=64",
         "--length=40", "--batch=2", "--steps=1", "--warmup=1")  # fmt: skip
NO_TRL = "TRL cannot be imported"
RESERVE = 5  # seconds for printing the logs of the benchmark's workers
FIGURES = {  # fact -> key of a side in the benchmark's record, and the divisor of its value
    "pairs/s": ("per_second", 1.0),
    "tokens/s": ("tokens_per_second", 1.0),
    "TFLOP/s": ("tflops", 1.0),
    "MFU": ("mfu", 1.0),
    "peak memory, GiB": ("peak_memory_mb", 1024.0),
    "reference pass, s": ("reference_seconds", 1.0),
    "until the first step, s": ("startup_seconds", 1.0),
}


def ours(setup: Setup) -> Iterator[Fact]:
    yield from measured(setup, "ours", LARGE, "--sides=ours")


def trl(setup: Setup) -> Iterator[Fact]:
    yield from compared_with(setup, 7, "ours", measured(setup, "TRL", LARGE, *side_of_trl(setup)))


def compiled(setup: Setup) -> Iterator[Fact]:
    compile_blocks = "--ours=hardware.compile=blocks"
    words = ("--sides=ours", *(() if setup.small else (compile_blocks,)))
    yield from compared_with(setup, 7, "ours", measured(setup, "compiled", LARGE, *words))


def lora(setup: Setup) -> Iterator[Fact]:
    yield from measured(setup, "ours", SEVEN, "--lora=lora", "--sides=ours")


def lora_trl(setup: Setup) -> Iterator[Fact]:
    facts = measured(setup, "TRL", SEVEN, "--lora=lora", *side_of_trl(setup))
    yield from compared_with(setup, 10, "ours", facts)


def side_of_trl(setup: Setup) -> tuple[str, ...]:
    """TRL with cached reference and the batch in micro-batches."""
    return "--sides=trl", f"--candidate=cached-{2 if setup.small else 4}"


def qlora(setup: Setup) -> Iterator[Fact]:
    kind = "lora" if setup.small else "qlora"
    facts = measured(setup, "QLoRA", SEVEN, f"--lora={kind}", "--sides=ours")
    yield from compared_with(setup, 10, "ours", facts, same=False)


def weights(setup: Setup) -> Iterator[Fact]:
    """Create the input of the benchmark before it measures."""
    jobs = {"gpt2-large, s": LARGE, "7B, s": (*SEVEN, "--lora=lora")}
    if setup.small:
        jobs = {"gpt2-large, s": SMALL, "7B, s": (*SMALL, "--lora=lora")}
    with ThreadPoolExecutor(1 if setup.small else len(jobs)) as pool:
        waiting = {name: pool.submit(make, setup, words) for name, words in jobs.items()}
        for name, job in waiting.items():
            yield name, job.result()


def make(setup: Setup, words: Sequence[str]) -> float:
    """Create weights and rows for these arguments where a command with the same ones finds them.
    Returns seconds."""
    from scripts.bench import options
    from scripts.bench.plan import make_plan, shape_of

    start = time.monotonic()
    args = options.parse(options.parser(None), arguments(setup, words))
    make_plan(args, shape_of(args)[1], Path(args.keep)).prepare(setup.threads)
    return time.monotonic() - start


def measured(setup: Setup, name: str, shape: tuple[str, ...], *words: str) -> Iterator[Fact]:
    """The figures of the one side measured by a benchmark command."""
    record = record_of(setup, *(SMALL if setup.small else shape), *words)
    ((side, figures),) = record["results"].items()
    for fact, (key, unit) in FIGURES.items():
        if figures.get(key) is not None:
            yield f"{name}, {fact}", figures[key] / unit
    for key in ("attention", "micro_batch_tokens"):
        if key in record["sides"][side]:
            yield key.replace("_", " "), record["sides"][side][key]
    losses = record["sides"][side]["figures_by_step"]["loss"]
    yield "first loss", losses[0]
    yield "losses", " ".join(f"{loss:.4f}" for loss in losses)
    yield "rows", record["data"]["label"]
    yield "command", record["command"]


def compared_with(
    setup: Setup, number: int, other: str, facts: Iterator[Fact], same: bool = True
) -> Iterator[Fact]:
    """The facts of this step, compared with those of an earlier one, if it ran. same: both train
    the same, so their losses must agree."""
    values: dict[str, Any] = {}
    for fact, value in facts:
        values[fact] = value
        yield fact, value
    path = Path(setup.work, f"step-{number}.json")
    earlier = json.loads(path.read_text())["facts"] if path.is_file() else {}
    if "losses" not in earlier:
        return
    name = next(fact for fact in values if fact.endswith(", pairs/s")).partition(",")[0]
    for what in ("pairs/s", "peak memory, GiB"):
        ratio = values[f"{name}, {what}"] / earlier[f"{other}, {what}"]
        if name == "TRL":
            yield f"{what}, {other} / {name}", 1 / ratio
        else:
            yield f"{what}, {name} / {other}", ratio
    if same:
        losses = [[float(x) for x in step["losses"].split()] for step in (values, earlier)]
        away = max(abs(a - b) for a, b in zip(*losses, strict=True))
        yield "losses, largest difference from ours", away


def record_of(setup: Setup, *words: str) -> dict[str, Any]:
    """The record at the end of `bench.py`'s output. Its input is kept for the next command."""
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *arguments(setup, words)]
    try:
        code, stdout = output_of(command, setup.seconds - RESERVE)
    except subprocess.TimeoutExpired:
        print_worker_logs(setup)
        raise
    print(stdout, flush=True)  # its errors went to the log
    lines = stdout.strip().splitlines()
    record: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1][:1] == "{" else {}
    failed = record.get("failed") or []
    if failed and failed[0]["why"].startswith(NO_TRL):
        raise Skip(failed[0]["why"])
    if code or failed or not record.get("results"):
        reasons = "; ".join(f"{one['name']}: {one['why']}" for one in failed) or f"code {code}"
        raise RuntimeError(f"bench.py: {reasons}; its output is in the log")
    return record


def arguments(setup: Setup, words: Sequence[str]) -> list[str]:
    """Equal for all sides, so that they use the same weights and rows."""
    shared = [f"--device={setup.device}", "--precision=" + ("fp32" if setup.small else "bf16"),
           "--rounds=1", "--busy-ok", "--json", f"--keep={setup.folder('bench')}",
           f"--out={setup.folder('pages')}", f"--threads={setup.threads}"]  # fmt: skip
    if setup.data and not setup.small:
        shared += [f"--data={setup.data}", "--adapter=hh"]
        if setup.tokenizer and LARGE[0] in words:  # GPT-2's has more tokens than Mistral
            shared += [f"--tokenizer={setup.tokenizer}"]
    return [*words, *shared]


def output_of(command: list[str], seconds: float) -> tuple[int, str]:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False,
        timeout=seconds,
    )  # fmt: skip
    return done.returncode, done.stdout


def print_worker_logs(setup: Setup) -> None:
    """The log of the last worker."""
    logs = sorted(setup.folder("bench").rglob("log.txt"), key=lambda path: path.stat().st_mtime)
    for path in logs[-1:]:
        print(f"----- {path}", path.read_text(errors="replace")[-8000:], sep="\n", flush=True)
