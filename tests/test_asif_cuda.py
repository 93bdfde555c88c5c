"""Whole runs on a pretended GPU: nothing is on the wrong side, and a step waits twice."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asif_cuda import GPU, as_if_cuda
from dpo_cli.config import ModelConfig
from dpo_cli.model.attention.interface import prepare_layout, use_kernel
from dpo_cli.model.forward import loss_and_logprobs
from dpo_cli.model.load import make_ready
from dpo_cli.run import run
from dpo_cli.train import loop
from small_models import FAMILIES, build, examples, packed
from small_runs import TINY, configure, metrics, train

HERE = (*TINY, "hardware=cuda", "data.rows=16", "data.eval_rows=4", "train.max_steps=2",
        "train.eval_every_steps=0")  # fmt: skip
PPO = (
    "stage=ppo-baseline", "stage.rollout_samples=8", "train.max_steps=4", "stage.ppo_epochs=2",
    "train.batch_size=4", "stage.max_new_tokens=6", "stage.normalize_prompts=4",
    "stage.eval_prompts=3", "stage.no_eos_score=null",
)  # fmt: skip


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Any:
    with as_if_cuda(monkeypatch) as counted:
        yield counted


@pytest.fixture
def waits_of_steps(waits: Counter[str], monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """What each training step waited for; not what comes before its clock starts."""
    found: list[Counter[str]] = []
    real = loop._train_step

    def step(fit: Any) -> dict[str, float]:
        if fit.task.before_step is not None:
            fit.before = fit.task.before_step(fit.step) or fit.before
            fit.task.before_step = lambda step: {}
        before = waits.copy()
        values = real(fit)
        found.append(waits - before)
        return values

    monkeypatch.setattr(loop, "_train_step", step)
    return found


def go(folder: Path, *words: str) -> dict[str, Any]:
    return run(configure(*HERE, f"run_dir={folder}", *words), ["dpo-run"])


def test_the_pretended_gpu_refuses_what_a_real_one_would(waits: Counter[str]) -> None:
    here, there = torch.ones(3), torch.ones(3).to(GPU, non_blocking=True)
    assert (here.device.type, there.device, there.view(1, 3)[0].is_cuda) == ("cpu", GPU, True)
    assert (there * 2).device == torch.zeros_like(there).device == GPU
    assert (there * torch.tensor(2.0)).device == GPU  # a number may lie on the host
    with pytest.raises(RuntimeError, match=r"add: expected all tensors to be on the same device"):
        there + here
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        there.numpy()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        np.asarray(there)
    assert waits == {}
    assert there.tolist() == [1.0, 1.0, 1.0]
    assert float(there.sum()) == 3.0
    assert there.cpu().numpy().sum() == 3.0
    assert there[there > 0].device == GPU
    assert waits == {"tolist": 1, "_local_scalar_dense": 1, "cpu": 1, "index": 1}
    assert here.to(GPU).device == GPU
    assert waits["to"] == 1
    weight = torch.nn.Parameter(here.clone())
    (weight.to(GPU) * there).sum().backward()
    assert isinstance(weight.grad, Tensor)
    assert weight.grad.device.type == "cpu"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, and a reward model, both trained on the CPU."""
    folder = tmp_path_factory.mktemp("base")
    small = ("data.rows=24", "train.max_steps=2", "data.eval_rows=4")
    train(folder / "sft", *small, "stage=sft", "train.sample_prompts=0")
    train(folder / "reward", *small, "stage=reward", "stage.normalize_prompts=0",
          f"model.path={folder / 'sft'}")  # fmt: skip
    return folder


def rewarded(base: Path) -> tuple[str, str]:
    return "reward_fn=reward_model", f"reward_fn.path={base / 'reward'}"


@pytest.mark.parametrize(
    "stage", ["sft", "dpo", "reward", "ppo", "online", "live", "lora", "recomputed"]
)
def test_a_step_waits_for_its_figures_and_its_norm(
    base: Path, tmp_path: Path, waits_of_steps: list[Counter[str]], stage: str
) -> None:
    words = {
        "sft": ("stage=sft",), "dpo": ("stage=dpo",), "ppo": (*PPO, *rewarded(base)),
        "reward": ("stage=reward", "stage.normalize_prompts=4"),
        "live": ("stage=dpo", "stage.reference_logprobs=live"),
        "online": ("stage=online-dpo", "stage.pairs=all", "stage.max_new_tokens=6",
                   "train.batch_size=4", "stage.rollout_prompts=8", *rewarded(base)),
        "lora": ("stage=dpo", "lora=lora"),
        "recomputed": ("stage=sft", "hardware.activation_checkpointing=1"),
    }[stage]  # fmt: skip
    go(tmp_path / "r", *words, f"model.path={base / 'sft'}")
    assert len(waits_of_steps) >= 2
    for counted in waits_of_steps:
        assert counted == {"tolist": 1, "_local_scalar_dense": 1}
    losses = [row["loss"] for row in metrics(tmp_path / "r") if "loss" in row]
    assert all(map(math.isfinite, losses))
    if stage in ("dpo", "live", "lora"):
        assert losses[1] == pytest.approx(math.log(2), abs=1e-3)  # behind the evaluation's


def test_a_run_is_resumed(base: Path, tmp_path: Path, waits: Counter[str]) -> None:
    """Optimiser and random states go to the device and back."""
    words = ("stage=sft", f"model.path={base / 'sft'}", "train.save_every_steps=1")
    go(tmp_path / "r", *words)
    before = [row["loss"] for row in metrics(tmp_path / "r") if "loss" in row]
    for path in (tmp_path / "r" / "checkpoints" / "step-2", tmp_path / "r" / "final"):
        shutil.rmtree(path)
    go(tmp_path / "r", *words, "resume=true")
    after = [row["loss"] for row in metrics(tmp_path / "r") if "loss" in row]
    assert after == pytest.approx(before, abs=1e-6)


def test_stages_that_sample_and_score(base: Path, tmp_path: Path, waits: Counter[str]) -> None:
    policy = f"model.path={base / 'sft'}"
    common = ("data=sentiment", "data.rows=24", "data.eval_rows=6", "hardware=cuda", "logger=none",
              "logger.progress=off", "model=custom", policy)  # fmt: skip
    sampling = ("stage.max_new_tokens=8", "stage.batch_size=8")

    def do(name: str, *words: str) -> dict[str, Any]:
        return run(configure(*common, *words, f"run_dir={tmp_path / name}"), ["dpo-run"])

    do("samples", "stage=sample", "stage.completions=4", "stage.prompts=8", *sampling)
    pairs = do("pairs", "stage=label", f"stage.samples={tmp_path / 'samples'}", *rewarded(base))
    assert pairs["train_pairs"] > 0
    found = do(
        "evaluation", "stage=evaluate", *sampling, f"stage.reference={base / 'sft'}",
        *rewarded(base), "stage.reference_samples=16", "stage.prompts=4", "stage.opponent=chosen",
        f"stage.pairs={tmp_path / 'pairs' / 'train.jsonl'}",
    )  # fmt: skip
    assert found["kl"] == pytest.approx(0.0, abs=1e-3)
    assert math.isfinite(found["reward"])


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"mixtral"}))  # asks who goes where
def test_a_micro_batch_never_waits(waits: Counter[str], family: str) -> None:
    """Packed by the kernel of CUDA; forward, loss and backward."""
    model = build(family).float()
    make_ready(model, ModelConfig(), range(96))  # type: ignore[arg-type]
    # varlen has no soft-capping; GPT-J ignores a registered attention
    kernel = {"gemma2": "sdpa", "gptj": "dense"}.get(family, "varlen")
    use_kernel(model, kernel)
    model.to(GPU)
    row = prepare_layout(packed(examples(4)), kernel).pin_memory()
    for _ in range(2):  # the first may set things up
        waits.clear()
        with torch.autocast("cuda", torch.bfloat16):
            loss, logprobs = loss_and_logprobs(model, row.to(GPU), lambda v, _: -v.sum())
        loss.backward()
    assert waits == {}
    assert logprobs.device == loss.device == GPU
    assert all(p.grad is None or p.grad.device == GPU for p in model.parameters())
