"""What a GPU adds to a run: adapters over quantised weights, hardware.*, resuming, running out of
memory, ranks that share a device, scores. Skipped without a device; see gpu_runs.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from dpo_cli.data.dataset import load_splits
from dpo_cli.distributed.ranks import SHARE_GPUS
from dpo_cli.rewards.scorers import Completed
from dpo_cli.rewards.scoring import load_scorer
from dpo_cli.train.runtime import start_runtime
from gpu_runs import DEVICE, HERE, ON_CPU, RUN, SMALL, Chain, chain, reason, start, write_llama
from scoring_helpers import session_of
from small_runs import configure
from test_scoring import saved as saved_classifier

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(125)]
STEPS = (*RUN, "train.sample_prompts=0", "train.eval_every_steps=0", "train.batch_size=16",
         "train.max_steps=6", "optim.lr=1e-3")  # fmt: skip
TINY = (*SMALL, *STEPS)
LLAMA = (*STEPS, "model=custom", "model.path=llama")
KINDS = ("lora", "qlora", "int8")


def llama(folder: Path) -> None:
    write_llama(folder / "llama")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    words = (*LLAMA, *HERE, "train.max_steps=3", "optim.lr=1e-2", "lora.r=4")
    return chain(tmp_path_factory, "adapters", [
        (*words, f"lora={kind}", f"stage={stage}", f"run_dir={kind}-{stage}")
        for stage in ("sft", "dpo") for kind in KINDS
    ], llama)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_over_weights_of_every_kind(adapted: Chain, kind: str) -> None:
    adapted.ended(0, 0, 0, 0, 0, 0)
    first = adapted.losses(f"{kind}-dpo")[0]  # the policy is the reference
    assert first == pytest.approx(math.log(2), abs=2e-2 if kind == "int8" else 2e-3)
    losses = adapted.losses(f"{kind}-sft")
    assert losses[-1] < losses[0]
    plain = adapted.losses("lora-sft")[0]
    assert losses[0] == pytest.approx(plain, abs={"lora": 0, "int8": 0.05}.get(kind, 0.2))
    final = adapted.folder / f"{kind}-dpo" / "final"
    assert (final / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    words = (*LLAMA, "stage=sft", "optim.lr=3e-4")
    choices = {
        "plain": HERE,
        "recomputed": (*HERE, "hardware.activation_checkpointing=1"),
        "half": (*HERE, "hardware.weights=bf16"),
        "sdpa": (*HERE, "model.attention=sdpa"),
        "dense": (*HERE, "model.attention=dense"),
        # without FlexAttention, which float32 would take, and compile for half a minute
        "exact": (*HERE, "hardware.precision=fp32", "model.attention=sdpa"),
        "truth": ON_CPU,
    }
    commands = [(*words, *where, f"run_dir={name}") for name, where in choices.items()]
    return chain(tmp_path_factory, "settings", commands, llama)


@pytest.mark.parametrize(
    ("run", "to", "within"),
    [
        ("exact", "truth", 1e-4),
        ("plain", "truth", 1e-2),
        ("recomputed", "plain", 1e-3),
        ("sdpa", "plain", 5e-3),
        ("dense", "plain", 5e-3),
        ("half", "plain", 5e-2),
    ],
)
def test_settings_of_the_hardware_leave_the_losses(
    settings: Chain, run: str, to: str, within: float
) -> None:
    settings.ended(0, 0, 0, 0, 0, 0, 0)
    assert settings.losses(run) == pytest.approx(settings.losses(to), abs=within)
    assert settings.losses(run)[-1] < settings.losses(run)[0]


def test_a_compiled_forward_leaves_the_losses(tmp_path_factory: pytest.TempPathFactory) -> None:
    words = (*LLAMA, *HERE, "stage=sft", "train.max_steps=3")
    compiled = (*words, "run_dir=compiled", "hardware.compile=true")
    found = chain(tmp_path_factory, "compile", [(*words, "run_dir=plain"), compiled], llama)
    found.ended(0, 0)
    assert found.losses("compiled") == pytest.approx(found.losses("plain"), abs=5e-3)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Within 1e-3: attention's backward on CUDA adds up in any order."""
    words = (*TINY, *HERE, "stage=sft", "train.max_steps=8")
    found = chain(tmp_path_factory, "resume", [
        (*words, "run_dir=whole"),
        {"words": [*words, "run_dir=stopped"], "stop_after": 3},
        ("resume=stopped",),
    ])  # fmt: skip
    found.ended(0, 75, 0)
    assert len(found.losses("whole")) == 8
    assert found.losses("stopped") == pytest.approx(found.losses("whole"), abs=1e-3)


def test_a_step_out_of_memory_is_done_again_in_smaller_rows(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    wide: tuple[str, ...] = ()
    room = 300.0  # tokens
    if DEVICE == "cuda":
        wide = ("model.architecture.hidden=256", "model.architecture.layers=4", "data.rows=512",
                "train.batch_size=512", "train.micro_batch_tokens=16384")  # fmt: skip
        room = 0.6  # of what it takes
    words = [*TINY, *wide, *HERE, "stage=sft", "train.max_steps=3"]
    found = chain(tmp_path_factory, "memory", [
        (*words, "run_dir=whole"), {"words": [*words, "run_dir=short"], "room": room},
    ])  # fmt: skip
    found.ended(0, 0)
    assert "out of memory with" in found.said
    asked = 16_384 if DEVICE == "cuda" else 4_096
    assert all(tokens < asked for tokens in found.column("short", "micro_batch_tokens"))
    assert len(found.column("short", "micro_batch_tokens")) == 3
    assert found.losses("short") == pytest.approx(found.losses("whole"), abs=1e-3)
    assert found.column("short", "grad_norm") == pytest.approx(
        found.column("whole", "grad_norm"), rel=0.02
    )


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_ranks_train_as_one_process_does(tmp_path: Path, stage: str) -> None:
    """On one GPU, which NCCL refuses, by Gloo: weights sharded, sampling, saving, resuming."""
    words = [*TINY, *HERE, f"stage={stage}", "train.max_steps=3", "train.sample_prompts=2",
             "train.sample_max_new_tokens=4", "train.save_every_steps=2"]  # fmt: skip
    one = start(["-m", "dpo_cli", *words, "run_dir=one"], tmp_path)
    assert one.returncode == 0, reason(one.stderr)
    two = start(
        ["-m", "dpo_cli", *words, "run_dir=two", "hardware.devices=2"], tmp_path, {SHARE_GPUS: "1"}
    )
    assert two.returncode == 0, reason(two.stderr)
    found = Chain(tmp_path, [], "")
    assert found.losses("two") == pytest.approx(found.losses("one"), abs=2e-3)
    assert (tmp_path / "two" / "checkpoints" / "step-2" / "shards").is_dir()
    assert (tmp_path / "two" / "final" / "model.safetensors").is_file()


def scores_on(where: tuple[str, ...], folder: Path, *words: str) -> np.ndarray:
    """Of pairs of the generated reviews, by a reward on a device."""
    session, _ = session_of(folder, *words)
    config = configure(*TINY, *where, "stage=sft", f"run_dir={folder}")
    session.runtime = start_runtime(config.hardware, 0)
    pairs = load_splits(configure(*TINY, "stage=dpo", "data.rows=40").data, 7).train
    texts = [Completed(e.prompt, text) for e in pairs for text in e.responses]
    return np.array(load_scorer(session)(texts))


def test_a_classifier_scores_in_float32_on_the_device(tmp_path: Path) -> None:
    """A ground truth: bfloat16 would move its log-odds by a hundredth, TF32 by a thousandth."""
    folder, _ = saved_classifier("gpt2", tmp_path / "classifier")
    words = ("reward_fn=classifier", f"reward_fn.path={folder}", "reward_fn.scale=log_odds")
    exact, found = (scores_on(where, tmp_path, *words) for where in (ON_CPU, HERE))
    assert exact.std() > 0.05
    assert np.abs(found - exact).max() < 1e-4


def test_a_reward_model_ranks_on_the_device_as_in_float32(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    words = (*TINY, *HERE, "stage=reward", "run_dir=reward", "stage.normalize_prompts=0",
             "train.max_steps=12", "optim.lr=3e-3")  # fmt: skip
    words = tuple(word for word in words if not word.startswith("train.sample"))
    made = chain(tmp_path_factory, "reward", [words])
    made.ended(0)
    reward = ("reward_fn=reward_model", f"reward_fn.path={made.folder / 'reward'}")
    exact, near = (scores_on(where, tmp_path, *reward) for where in (ON_CPU, HERE))
    assert np.abs(near - exact).max() < 0.05 * exact.std()
    ranks = [np.argsort(np.argsort(values)) for values in (exact, near)]
    assert np.corrcoef(*ranks)[0, 1] > 0.995
    assert DEVICE == "cpu" or np.abs(near - exact).max() > 0  # it was bf16
