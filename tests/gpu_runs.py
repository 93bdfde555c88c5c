"""Real commands on the device, for tests: each chain of them runs once, whoever asks first.

`DPO_RUN_TEST_DEVICE=cpu` runs the same tests in bf16 on a CPU, to try the tests themselves.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_cli.grammar.tokenizer import build_tokenizer

CHAIN = Path(__file__).with_name("gpu_chain.py")
DEVICE = os.environ.get("DPO_RUN_TEST_DEVICE", "cuda")
HERE = ("hardware=cuda",) if DEVICE == "cuda" else ("hardware=cpu", "hardware.precision=bf16")
ON_CPU = ("hardware=cpu", "hardware.precision=fp32")
SMALL = (
    "model=tiny", "model.architecture.layers=2", "model.architecture.hidden=64",
    "model.architecture.heads=2", "model.architecture.context=128",
)  # fmt: skip
RUN = (
    "data=sentiment", "data.rows=64", "data.eval_rows=16", "logger=none", "logger.progress=plain",
    "logger.plots=false", "logger.report=false",
)  # fmt: skip
TRAIN = ("train.batch_size=16", "train.max_steps=6", "train.eval_every_steps=3")
SAMPLES = ("train.sample_prompts=2", "train.sample_max_new_tokens=8")
Command = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Chain:
    """Commands that ran in `folder`, what each left, and what all of them said."""

    folder: Path
    results: list[dict[str, Any]]
    said: str

    def ended(self, *codes: int) -> None:
        """Assert the exit codes; else say what went wrong, in a line."""
        found = [result["code"] for result in self.results]
        assert found == list(codes), f"exit codes {found}: {reason(self.said)}"

    def losses(self, run: str) -> list[float]:
        """Of the training steps of a run folder."""
        return self.column(run, "loss")

    def column(self, run: str, name: str) -> list[float]:
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return [row[name] for row in map(json.loads, lines) if name in row]

    def summary(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / run / "summary.json").read_text())
        return found


def chain(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    commands: Sequence[Command],
    before: Callable[[Path], object] = lambda folder: None,
) -> Chain:
    """The commands in one process; by whichever of xdist's workers comes first. before: what is
    put into the folder."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / f"chain-{name}"
    folder.mkdir(exist_ok=True)
    asked, found, said = (folder / n for n in ("commands.json", "results.json", "said.txt"))
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.is_file():
            before(folder)
            asked.write_text(json.dumps([
                dict(c) if isinstance(c, Mapping) else {"words": list(c)} for c in commands
            ]))  # fmt: skip
            done = start([str(CHAIN), str(asked), str(found)], folder)
            said.write_text(done.stderr)
    results = json.loads(found.read_text()) if found.is_file() else []
    assert len(results) == len(commands), f"command {len(results)}: {reason(said.read_text())}"
    return Chain(folder, results, said.read_text())


def reason(said: str) -> str:
    """The errors that were told, last ones first."""
    lines = [line for line in said.splitlines() if re.match(r"(error: |[\w.]*Error\b)", line)]
    return " | ".join(line[:250] for line in lines[:-4:-1]) or said[-400:]


def start(
    arguments: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """This Python with the arguments, in a folder, with a cache of its own."""
    path = [str(CHAIN.parent.parent), os.environ.get("PYTHONPATH")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "COLUMNS": "200"}
    own |= {"DPO_RUN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, **own, **(env or {})},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def write_llama(folder: Path) -> None:
    """A random Llama with grouped queries, of a width that every kernel takes."""
    tokenizer = build_tokenizer(1024)
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
