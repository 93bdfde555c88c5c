"""Step 5: a run with limited memory halves its micro-batches and computes the same."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_cli.run import run
from dpo_cli.stages import dpo
from scripts.common import metrics_of
from scripts.gpu_checks.facts import Fact, Setup
from scripts.measuring import compose

COMMON = (
    "stage=dpo", "model=tiny", "data=sentiment", "data.eval_rows=0", "logger=none",
    "logger.progress=off", "train.eval_every_steps=0", "train.save_every_steps=0",
    "train.sample_prompts=0", "train.max_steps=4", "optim.lr=1e-5", "optim.warmup_steps=0",
)  # fmt: skip
# Activations of a step take several times the memory of weights and optimizer.
LARGE = ("model.architecture.layers=16", "model.architecture.hidden=512",
         "model.architecture.heads=8", "data.rows=1024", "train.batch_size=512")  # fmt: skip
SMALL = ("model.architecture.layers=1", "model.architecture.hidden=32",
         "model.architecture.heads=2", "data.rows=16", "train.batch_size=8")  # fmt: skip
SHARE = 0.6  # fraction of the memory that the unlimited run used
FEW_TOKENS = 100


def check(setup: Setup) -> Iterator[Fact]:
    folder = setup.folder("shortage")
    words = [*COMMON, *(SMALL if setup.small else LARGE), f"hardware={setup.device}",
             f"cache_dir={folder / 'cache'}"]  # fmt: skip
    plenty = losses(folder / "plenty", words)
    yield "losses", " ".join(f"{row['loss']:.4f}" for row in plenty)
    if setup.small:
        dpo.dpo_loss = failing_above(FEW_TOKENS, dpo.dpo_loss)  # type: ignore[assignment]
    else:
        peak, total = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
        gc.collect()
        yield "peak memory, GiB", peak / 2**30
        torch.cuda.empty_cache()
        yield "of it kept by the first run, GiB", torch.cuda.memory_reserved() / 2**30
        torch.cuda.set_per_process_memory_fraction(SHARE * peak / total)
    short = losses(folder / "short", words)
    budgets = [row["micro_batch_tokens"] for row in short if "micro_batch_tokens" in row]
    first = [row["micro_batch_tokens"] for row in plenty if "micro_batch_tokens" in row]
    yield "tokens of a micro-batch", " ".join(map(str, budgets))
    yield "times halved", len(set(budgets) - set(first))
    away = [abs(a["loss"] - b["loss"]) for a, b in zip(plenty, short, strict=True)]
    yield "losses, largest difference", max(away)


def losses(run_dir: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """The logged steps of a run in this process."""
    overrides = [*words, f"run_dir={run_dir}"]
    run(compose(overrides), ["dpo-run", *overrides])
    return [row for row in metrics_of(run_dir) if "loss" in row]


def failing_above(tokens: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Fail as if the device were full: on a CPU the memory of one process cannot be limited."""

    def broken(model: Any, batch: Any, *args: Any, **options: Any) -> Any:
        if batch.input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("out of memory, injected")
        return function(model, batch, *args, **options)

    return broken
