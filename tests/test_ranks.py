"""Runs of 2 and 4 processes (gloo) against the run of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from dpo_cli.distributed import sharded_checkpoint
from dpo_cli.distributed.ranks import Ranks
from dpo_cli.errors import ConfigError, DiskError
from dpo_cli.packing import deal, pack_share
from dpo_cli.records import EncodedExample
from dpo_cli.train import loop
from dpo_cli.train.memory import TokenBudget
from small_adapters import write_base
from small_runs import metrics, train

SHARED = (
    "data.rows=160", "train.micro_batch_tokens=256", "train.eval_every_steps=10", "seed=3",
    "train.save_every_steps=10", "logger.report=false",
)  # fmt: skip
LORA = ("lora=lora", "lora.r=4", "optim.lr=1e-3")
PPO = (
    "stage.rollout_samples=16", "stage.max_new_tokens=6", "stage.batch_size=4",
    "stage.normalize_prompts=8", "stage.eval_prompts=6", "stage.ppo_epochs=2",
)  # fmt: skip
STAGES: dict[str, tuple[str, ...]] = {
    "sft": ("stage=sft", "train.epochs=1"),
    "dpo": ("stage=dpo", "train.epochs=1", "optim.lr=1e-3"),
    "sft-lora": ("stage=sft", "model.path={root}/start", "train.max_steps=20", *LORA),
    "dpo-lora": ("stage=dpo", "model.path={root}/one-sft-lora", "train.max_steps=20", *LORA),
    "dpo-dora": ("stage=dpo", "model.path={root}/llama", "train.max_steps=6", "lora.r=4",
                 "optim.lr=1e-3", "lora=dora"),
    "dpo-qlora": ("stage=dpo", "model.path={root}/llama", "train.max_steps=6", "lora.r=4",
                  "optim.lr=1e-3", "lora=qlora", "stage.reference_logprobs=live"),
    "reward": ("stage=reward", "model.path={root}/start", "train.max_steps=4",
               "stage.normalize_prompts=8"),
    "ppo": ("stage=ppo-baseline", "model.path={root}/start", "train.max_steps=8", *PPO),
    "online": ("stage=online-dpo", "model.path={root}/start", "train.max_steps=8", "optim.lr=1e-3",
               "stage.max_new_tokens=6", "stage.batch_size=4", "stage.eval_prompts=6",
               "stage.rollout_prompts=16", "stage.pairs=all", "stage.completions=3"),
}  # fmt: skip
ON_FOUR = ("dpo", "dpo-lora")
HYBRID = ("hardware.nodes=2", "hardware.devices=2", "hardware.sharding=hybrid")
TIMINGS = ("time", "seconds", "per_second", "memory", "mfu")


def words(name: str, root: Path) -> list[str]:
    cache = f"cache_dir={root}/cache"  # the encoded rows, and the references of one process
    return [*SHARED, cache, *(word.format(root=root) for word in STAGES[name])]


def start_ranks(count: int, jobs: list[dict[str, Any]], root: Path) -> None:
    path = root / f"jobs-{count}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(__file__).with_name("rank_jobs.py")
    done = subprocess.run(
        [*command, f"--nproc-per-node={count}", str(script), str(path)],
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},  # it imports beside it
        check=False, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage on one process."""
    folder = tmp_path_factory.mktemp("ranks")
    write_base(folder / "llama", "llama")
    train(folder / "start", *SHARED, f"cache_dir={folder}/cache", "stage=sft", "train.max_steps=2")
    for name in STAGES:
        train(folder / f"one-{name}", *words(name, folder))
    return folder


@pytest.fixture(scope="module")
def two(root: Path) -> Path:
    """The same on two, and from a checkpoint of two on two."""
    jobs = [
        {"run_dir": str(root / f"two-{name}"), "overrides": words(name, root)} for name in STAGES
    ]
    interrupted(root / "one-sft", root / "two-on-one")
    again = [*words("sft", root), "resume=true"]
    jobs.append({"run_dir": str(root / "two-on-one"), "overrides": again})
    start_ranks(2, jobs, root)
    return root


@pytest.fixture(scope="module")
def four(two: Path) -> Path:
    """Two stages on four, and a checkpoint of two read by four, by two and by one."""
    jobs = [
        {"run_dir": str(two / f"four-{name}"), "overrides": words(name, two)} for name in ON_FOUR
    ]
    for name in ("sft", "sft-lora"):
        interrupted(two / f"two-{name}", two / f"four-on-{name}")
        again = [*words(name, two), "resume=true"]
        jobs.append({"run_dir": str(two / f"four-on-{name}"), "overrides": again})
    hybrid = [*words("dpo", two), *HYBRID]
    jobs.append({"run_dir": str(two / "four-hybrid"), "overrides": hybrid})
    start_ranks(4, jobs, two)
    return two


def interrupted(run: Path, target: Path) -> None:
    """A copy of a run of 20 steps as if it had been killed after its tenth was saved."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "checkpoints" / "step-20")
    shutil.rmtree(target / "final")


def figures(run: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if not any(word in k for word in TIMINGS)}
        for row in metrics(run)
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "final").glob("*model.safetensors")
    return load_file(path)


def assert_same_run(found: Path, truth: Path) -> None:
    pairs = list(zip(figures(found), figures(truth), strict=True))
    assert len(pairs) > 4
    for ours, theirs in pairs:
        # A correlation of margins near zero multiplies their rounding.
        correlations = [row.pop("eval/rewards/length_correlation", 0.0) for row in (ours, theirs)]
        assert correlations[0] == pytest.approx(correlations[1], abs=1e-3)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        if "loss" in theirs:
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_train_as_one(two: Path, name: str) -> None:
    assert_same_run(two / f"two-{name}", two / f"one-{name}")
    ours, truth = weights(two / f"two-{name}"), weights(two / f"one-{name}")
    assert ours.keys() == truth.keys()
    for key, value in ours.items():
        assert value.dtype == truth[key].dtype
        # AdamW moves a weight whose gradient is mere rounding by the rate, up or down.
        torch.testing.assert_close(value, truth[key], rtol=0, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_train_as_one(four: Path, name: str) -> None:
    assert_same_run(four / f"four-{name}", four / f"one-{name}")


@pytest.mark.slow
def test_nodes_that_each_hold_the_weights_train_as_one(four: Path) -> None:
    """Two nodes of two devices: hybrid sharding."""
    assert_same_run(four / "four-hybrid", four / "one-dpo")


@pytest.mark.slow
@pytest.mark.parametrize(("count", "run"), [(2, "two-sft"), (4, "four-dpo")])
def test_every_example_is_trained_on_once(four: Path, count: int, run: str) -> None:
    """An epoch, over all ranks; each step the examples that one process would have taken."""
    shares = [json.loads((four / run / f"examples-{r}.json").read_text()) for r in range(count)]
    assert all(len(share) >= 20 for share in shares)
    steps = [Counter(i for part in parts for i in part) for parts in zip(*shares, strict=True)]
    assert all(sum(step.values()) == 8 for step in steps)
    taken = distinct_steps(steps)
    assert sum(taken, Counter()) == Counter(range(160))


def distinct_steps(steps: list[Counter[int]]) -> list[Counter[int]]:
    """Without the rows of a step that are packed again, to look at what it did."""
    return [s for i, s in enumerate(steps) if s not in steps[:i]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "sft-lora"])
def test_a_checkpoint_of_two_goes_on_with_four(four: Path, name: str) -> None:
    found, truth = figures(four / f"four-on-{name}"), figures(four / f"one-{name}")
    for ours, theirs in zip(found[-12:], truth[-12:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["sft", "sft-lora"])
def test_a_checkpoint_of_two_goes_on_with_one(two: Path, name: str) -> None:
    interrupted(two / f"two-{name}", two / f"one-on-{name}")
    train(two / f"one-on-{name}", *words(name, two), "resume=true")
    found, truth = figures(two / f"one-on-{name}"), figures(two / f"one-{name}")
    for ours, theirs in zip(found[-12:], truth[-12:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_checkpoint_of_one_goes_on_with_two(two: Path) -> None:
    """Weights and optimiser state in Hugging Face's layout are cut for the ranks."""
    found, truth = figures(two / "two-on-one"), figures(two / "one-sft")
    for ours, theirs in zip(found[-12:], truth[-12:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_checkpoints_hold_shards_and_nothing_pickled(two: Path) -> None:
    step = two / "two-sft" / "checkpoints" / "step-20"
    names = sorted(p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file())
    assert len([name for name in names if name.startswith("shards/")]) == 2
    assert all(name.endswith((".safetensors", ".json")) for name in names)
    sizes = [(step / name).stat().st_size for name in names if name.startswith("shards/")]
    assert max(sizes) < 1.2 * min(sizes)


def test_a_disk_error_of_any_rank_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.distributed.checkpoint gathers them."""
    cause = (OSError(27, "File too large"), None)

    def full(*args: Any, **kwargs: Any) -> None:
        raise CheckpointException("save", {1: cause})  # type: ignore[dict-item]

    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(sharded_checkpoint.dcp, "save", full)
    with pytest.raises(DiskError) as error:
        sharded_checkpoint.write(tmp_path, model, torch.optim.AdamW(model.parameters()))
    told = f"rank 1 cannot write its shard: {tmp_path}/shards: File too large: raise the file"
    assert told in str(error.value)


def test_ranks_that_would_part_are_stopped() -> None:
    class Apart(Ranks):
        def gather(self, value: Any) -> Any:
            return [value, {**value, "rows": "others"}]

    task = SimpleNamespace(identity={"rows": "mine"}, steps=3, budget=TokenBudget(8))
    with pytest.raises(ConfigError, match="rank 1 has another rows than rank 0"):
        loop.check_ranks_agree(Apart(0, 2), task)  # type: ignore[arg-type]
    loop.check_ranks_agree(Ranks(), task)  # type: ignore[arg-type]


def test_only_the_first_rank_writes(two: Path) -> None:
    one, many = ({p.name for p in (two / f"{n}-dpo").iterdir()} for n in ("one", "two"))
    assert many - {"examples-0.json", "examples-1.json"} == one
    steps = [row["step"] for row in metrics(two / "two-dpo")]
    assert steps == [row["step"] for row in metrics(two / "one-dpo")]


sizes_of_examples = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@given(sizes_of_examples, st.integers(1, 120), st.integers(1, 6))
def test_deal_keeps_to_the_budget_and_loses_nothing(
    sizes: list[int], budget: int, ranks: int
) -> None:
    groups = deal(sizes, budget, ranks)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert len(groups) % ranks == 0
    for group in groups:
        assert sum(sizes[i] for i in group) <= budget or len(group) == 1
    # No round of rows is there for nothing: one less would not fit, or not by this rule.
    assert len(groups) == ranks or sum(sizes) > (len(groups) - 2 * ranks) * budget / 2


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(1, 5))
def test_shares_of_all_ranks_are_the_step(lengths: list[int], ranks: int) -> None:
    """By hand: as many rows a rank, each example in one row of one rank, fillers apart."""
    ids = np.arange(64, dtype=np.int32)
    examples = [EncodedExample(ids[:2], (ids[:n],), row) for row, n in enumerate(lengths)]
    order = list(range(len(examples)))[::-1]
    shares = [pack_share(examples, order, 30, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    real = [row for share in shares for row in share if not row.filler]
    assert sorted(i for row in real for i in row.example_ids.tolist()) == sorted(order)


def test_spread_gives_all_results_in_order() -> None:
    """The turns of four ranks over six items, played one after the other."""
    items, calls = list("abcdef"), []

    class Alone(Ranks):
        def gather(self, value: Any) -> Any:  # every rank's answers, as the others would give them
            return [[items[min(t * 4 + r, 5)].upper() for t in range(2)] for r in range(4)]

    for rank in range(4):
        seen: list[str] = []
        found = Alone(rank, 4).spread(items, lambda item, seen=seen: seen.append(item) or item)
        assert found == list("ABCDEF")
        calls.append(seen)
    assert calls == [["a", "e"], ["b", "f"], ["c", "f"], ["d", "f"]]
    assert list(islice(Ranks().spread(items, str.upper), 2)) == ["A", "B"]
