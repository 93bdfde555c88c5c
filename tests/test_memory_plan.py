"""The memory of whole runs, what would make one fit, and how `dry_run=true` tells it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from dpo_cli.config import HardwareConfig, LoraConfig
from dpo_cli.plan.dry_run import plan_tables
from dpo_cli.plan.lengths import scorer_parameters
from dpo_cli.plan.memory.budget import STEP, Fitting, fitting, is_open, with_tokens
from dpo_cli.plan.memory.estimate import Estimate, estimate
from dpo_cli.plan.memory.facts import capacity, texts_of
from dpo_cli.plan.memory.weights import adapter_parameters
from dpo_cli.records import EncodedExample
from dpo_cli.report.console import Progress
from dpo_cli.session.models import load_policy_and_data
from dpo_cli.session.session import Session
from dpo_cli.stages import sft
from dpo_cli.train.host_copy import HostCopy
from dpo_cli.train.runtime import start_runtime
from memory_runs import GIB, GPT2_XL, LLAMA, configured, facts, of
from small_runs import TINY, configure, train

# ---------------------------------------------------------------- whole runs


def parts(found: Estimate) -> dict[str, float]:
    """The largest that each part gets, in GB, whatever the moment."""
    names = {name for moment in found.moments.values() for name in moment}
    return {n: max(m.get(n, 0.0) for m in found.moments.values()) / 1e9 for n in names}


def test_a_full_run_holds_sixteen_bytes_a_weight() -> None:
    found = parts(of("stage=sft"))
    assert found["weights"] == pytest.approx(4 * 8.03, rel=1e-3)
    assert found["gradients"] == pytest.approx(4 * 8.03, rel=1e-3)
    assert found["optimizer state"] == pytest.approx(8 * 8.03, rel=1e-3)
    assert found["bf16 copies"] == pytest.approx(2 * 6.979, rel=1e-3)
    assert "gathered blocks" not in of("stage=sft").parts


def test_total_is_that_of_the_worst_moment_not_of_all_parts() -> None:
    found = of("stage=ppo-baseline", "reward_fn=length")
    assert found.total == max(sum(moment.values()) for moment in found.moments.values())
    assert found.total == sum(found.parts.values()) < sum(parts(found).values()) * 1e9
    assert "keys and values" not in found.moments["the backward"]
    assert "activations" not in found.moments["sampling"]


def test_gradients_beside_activations_where_a_step_has_several_micro_batches() -> None:
    one, two = of("stage=sft"), of("stage=sft", "train.micro_batch_tokens=2048")
    assert "gradients" not in one.moments["the backward"]
    assert two.moments["the backward"]["gradients"] == 4 * LLAMA.parameters
    half = two.moments["the backward"]["activations"] / one.moments["the backward"]["activations"]
    assert half == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("words", "copies"),
    [
        (["stage=dpo"], 0),
        (["stage=dpo", "stage.reference_logprobs=live"], 4),
        (["stage=dpo", "stage.reference=x/y"], 0),
        (["stage=dpo", "stage.reference_logprobs=live", "lora=lora"], 0),
        (["stage=dpo", "stage.reference_logprobs=live", "lora=lora", "stage.reference=x/y"], 2),
        (["stage=ppo-baseline", "reward_fn=length"], 4),
        (["stage=ppo-baseline", "reward_fn=length", "lora=qlora"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_reference(words: list[str], copies: int) -> None:
    """Bytes a weight, in the backward; with an adapter the reference is the policy without it."""
    held = of(*words).moments["the backward"]["reference"]
    assert held == copies * LLAMA.parameters


def test_a_named_reference_is_there_while_its_log_probabilities_are_computed() -> None:
    found = of("stage=dpo", "stage.reference=x/y")
    assert found.moments["the reference's pass"]["reference"] == 4 * LLAMA.parameters
    assert "the reference's pass" not in of("stage=dpo").moments


def test_sharding_divides_what_is_kept_and_gathers_what_computes() -> None:
    one, eight = of("stage=sft").moments, on_eight("stage=sft").moments
    for name in ("weights", "gradients", "optimizer state"):
        end = "the backward's end"
        assert eight[end][name] == pytest.approx(one[end][name] / 8)
    assert eight["the backward"]["gathered blocks"] > 0 == one["the backward"]["gathered blocks"]
    assert eight["the backward"]["bf16 copies"] == 0 < one["the backward"]["bf16 copies"]


def test_a_quantised_base_is_whole_on_every_device() -> None:
    one, eight = of("stage=sft", "lora=qlora"), on_eight("stage=sft", "lora=qlora")
    adapters = 4 * adapter_parameters(LoraConfig(name="qlora"), LLAMA)
    saved = one.parts["weights"] - eight.parts["weights"]
    assert saved == pytest.approx(adapters * 7 / 8)
    assert eight.moments["the backward"]["optimizer state"] == adapters * 2 / 8


def test_sharded_weights_are_whole_while_they_sample_but_not_while_they_load() -> None:
    eight = on_eight("stage=dpo")
    assert "loading" not in eight.moments
    assert eight.moments["sampling"]["gathered blocks"] == 2 * LLAMA.parameters
    assert "loading" not in of("stage=dpo").moments


@pytest.mark.parametrize(
    ("lora", "half", "stored", "size"),
    [("lora", False, 4, 4), ("lora", True, 4, 4 + 2), ("lora", True, 2, 2), ("none", True, 2, 6)],
)
def test_weights_on_a_cpu_are_there_twice_where_they_are_held_otherwise_than_stored(
    lora: str, half: bool, stored: int, size: int
) -> None:
    asked = configured("stage=sft", f"lora={lora}")
    there = replace(facts(shape=GPT2_XL, device="cpu", half=half), stored=stored)
    loading = estimate(asked, there).moments["loading"]
    assert loading["weights"] == size * GPT2_XL.parameters


def test_what_trains_nothing_has_the_whole_model_on_every_device() -> None:
    words = ("stage=sample", "lora=qlora")  # as a preset may leave it
    for found in (of(*words), on_eight(*words)):
        assert found.moments["sampling"]["weights"] == 4 * LLAMA.parameters
        assert found.moments["sampling"]["gathered blocks"] == 0


def on_eight(*words: str) -> Estimate:
    config = configured(*words)
    return estimate(replace(config, hardware=replace(config.hardware, devices=8)), facts())


def test_keys_and_values_by_hand() -> None:
    """64 sequences of 16 prompts of 256 tokens, 4 samples of 100: 32 layers, 2 x 8 x 128, bf16."""
    found = of("stage=sample", "stage.completions=4", "stage.max_new_tokens=100")
    tokens = 16 * 256 + 64 * 100
    assert found.moments["sampling"]["keys and values"] == 32 * 2 * 8 * 128 * 2 * tokens


def test_a_reward_model_is_held_in_float32() -> None:
    config = configured("stage=ppo-baseline", "reward_fn=length")
    found = estimate(config, replace(facts(), scorer=1000))
    assert found.moments["sampling"]["reward model"] == 4000
    assert found.moments["the backward"]["reward model"] == 4000


# ---------------------------------------------------------------- facts


def test_lengths_by_hand() -> None:
    """Prompts of 10 and 20, two responses each: 5 + 5 and 1 + 9 tokens."""
    found = texts_of([(10, [5, 5]), (20, [1, 9])], [[0], [0, 1], [1]])
    assert (found.step, found.longest, found.prompt) == (50, 30, 20)
    assert found.typical == (20 * 20 + 30 * 30) // 50
    assert found.keys == pytest.approx((2 * 10 + 10 + 2 * 20 + 10) / 50)
    assert found.scored == pytest.approx(20 / 50)


def test_capacity() -> None:
    assert capacity(HardwareConfig(memory_gb=22.5), "cuda") == 22.5 * 2**30
    one, two = (capacity(HardwareConfig(devices=n), "cpu") for n in (1, 2))
    assert one is not None
    assert two == one / 2 > 0


# ---------------------------------------------------------------- as it is told


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "ppo-baseline", "sample", "evaluate"])
def test_a_dry_run_of_every_stage_that_runs_a_model(stage: str, tmp_path: Path) -> None:
    words = (*TINY, f"stage={stage}", f"run_dir={tmp_path}/x", "hardware.memory_gb=1")
    rollouts = ("stage.rollout_samples=8",) if stage == "ppo-baseline" else ()
    config = configure(*words, *rollouts)
    rows, memory = plan_tables(config)
    assert dict(rows)["device"] == "cpu, fp32"
    assert dict(memory)["fits"] == "yes, a process has 1.0 GiB"


def test_the_plan_counts_what_is_learned_of_prompts() -> None:
    """A prompt of 5 tokens and a response of 3: 3 targets of 8 tokens, with the prompt's all but
    the first, 7 of 8. The second response is not trained on."""
    row = EncodedExample(np.arange(5), (np.arange(3), np.arange(9)), 0)
    splits: Any = SimpleNamespace(train=[row], eval=[])
    for word, lengths, scored in (("false", (5, [3]), 3 / 8), ("true", (1, [7]), 7 / 8)):
        config = configure(*TINY, "stage=sft", f"stage.train_on_prompt={word}")
        found = sft.workload(config, splits)
        assert found.lengths == [lengths]
        texts = texts_of(found.lengths, found.steps)
        assert (texts.longest, texts.scored) == (8, scored)


def test_a_gpu_that_is_not_here_can_be_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = configure("stage=dpo", "model=tiny", "data.rows=40", "data.eval_rows=4",
                       "hardware=gpu-24gb", "run_dir=x")  # fmt: skip
    rows, memory = plan_tables(config)
    assert dict(rows)["device"] == "cuda, bf16"
    assert str(dict(memory)["fits"]).startswith("yes, a GPU has ")


def test_a_local_reward_model_is_counted(tmp_path: Path) -> None:
    reward = tmp_path / "reward"
    train(reward, "stage=reward", "train.max_steps=1", "stage.normalize_prompts=0")
    words = (*TINY, "stage=ppo-baseline", f"run_dir={tmp_path}/x", "stage.rollout_samples=8")
    config = configure(*words, "reward_fn=reward_model", f"reward_fn.path={reward}")
    with safe_open(reward / "final" / "model.safetensors", "pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert scorer_parameters(config) == weights
    assert dict(plan_tables(config)[1])["reward model"] == "0 MiB"


# ---------------------------------------------------------------- micro-batches by memory


@pytest.mark.parametrize("gib", [32, 40, 80])
@pytest.mark.parametrize("lora", ["lora", "qlora"])
def test_micro_batches_are_the_most_that_are_estimated_to_fit(gib: int, lora: str) -> None:
    config, there = configured("stage=dpo", f"lora={lora}"), facts(step=200_000)
    found = fitting(config, there, gib * GIB)
    needed = estimate(with_tokens(config, found.tokens), there).total
    more = estimate(with_tokens(config, found.tokens + STEP), there).total
    assert found.needed == needed <= 0.9 * gib * GIB
    assert found.tokens == 16384 or more > 0.9 * gib * GIB
    assert found.tokens >= 768  # as long as the longest example
    assert f"up to {found.tokens:,} tokens at once" in str(found)


def test_micro_batches_are_never_shorter_than_an_example_nor_longer_than_the_default() -> None:
    config, there = configured("stage=dpo"), facts(step=200_000)
    small = fitting(config, there, 8 * GIB)
    assert (small.tokens, str(small).endswith(": the minimum")) == (768, True)
    large = fitting(config, there, 2000 * GIB)
    assert (large.tokens, str(large).endswith(": the default maximum")) == (16384, True)


def test_only_a_gpu_that_trains_has_its_micro_batches_chosen() -> None:
    assert is_open(configured("stage=dpo"), "cuda")
    assert not is_open(configured("stage=dpo"), "cpu")
    assert not is_open(configured("stage=sample"), "cuda")
    assert not is_open(configured("stage=dpo", "train.micro_batch_tokens=512"), "cuda")


def test_a_run_starts_with_what_was_chosen_and_says_so(tmp_path: Path) -> None:
    config = configure(*TINY, "stage=dpo", f"run_dir={tmp_path}", f"cache_dir={tmp_path}")
    progress, said = Progress("off"), []
    progress.note = said.append  # type: ignore[method-assign]
    chosen = Fitting(384, 3.0 * GIB, 4.0 * GIB)
    session = Session(
        config, tmp_path, start_runtime(config.hardware, 0), progress, [],
        choose_tokens=lambda tokenizer, splits: chosen,
    )  # fmt: skip
    asked = session.budget.configured
    load_policy_and_data(session)
    assert session.token_budget == 384 < asked == session.budget.configured
    assert "micro-batches: up to 384 tokens at once, estimated at 3.0 of 4.0 GiB" in said[-1]
    session.budget.restore({"asked": asked, "tokens": 200})  # an earlier start ran out
    assert session.token_budget == 200


def test_the_plan_tells_the_micro_batches(tmp_path: Path) -> None:
    words = ("stage=dpo", "hardware.device=cuda", "hardware.memory_gb=2", f"cache_dir={tmp_path}")
    rows = dict(plan_tables(configure(*TINY, *words))[1])
    assert str(rows["micro-batches"]).startswith("up to ")
    given = plan_tables(configure(*TINY, *words, "train.micro_batch_tokens=512"))[1]
    assert "micro-batches" not in dict(given)


@pytest.mark.parametrize("optim", ["adamw", "rmsprop", "adamw8bit"])
def test_the_copy_that_a_save_takes_is_as_large_as_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    sizes, real = [], HostCopy.take
    monkeypatch.setattr(
        HostCopy, "take", lambda self, made: sizes.append(made.size) or real(self, made)
    )
    words = ("stage=sft", f"optim={optim}", "train.max_steps=2", "train.save_every_steps=1",
             "data.eval_rows=0", "model.architecture.hidden=256")  # fmt: skip
    train(tmp_path / "r", *words)
    (told,) = (str(value) for name, value in plan_tables(configure(*TINY, *words, "run_dir=x"))[1]
               if name == "checkpoints")  # fmt: skip
    assert len(sizes) == 1  # the last one is written as it stands
    assert float(told.split()[2]) == pytest.approx(sizes[0] / 2**20, abs=0.6)  # told in whole MiB
