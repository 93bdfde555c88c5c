"""The memory of whole runs, what would make one fit, and how `dry_run=true` tells it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import GPT2Config, LlamaConfig

from dpo_cli.config import HardwareConfig, LoraConfig, RunConfig
from dpo_cli.memory.advice import Advice, advise, candidates
from dpo_cli.memory.estimate import Estimate, estimate
from dpo_cli.memory.facts import Facts, Texts, capacity, texts_of
from dpo_cli.memory.shape import shape_of
from dpo_cli.memory.table import memory_rows
from dpo_cli.memory.weights import adapter_parameters
from dpo_cli.plan import plan_tables, scorer_parameters
from small_runs import TINY, configure, train

GIB = 2**30
GPT2_XL = shape_of(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
LLAMA = shape_of(LlamaConfig(  # Llama 3.1 8 B
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256,
))  # fmt: skip
TEXTS = Texts(step=4096, longest=700, typical=512, keys=1.25, scored=0.5, prompt=256)


# ---------------------------------------------------------------- whole runs


def facts(shape: Any = LLAMA, device: str = "cuda", half: bool = True, **texts: Any) -> Facts:
    return Facts(shape, replace(TEXTS, **texts), device, half)


def of(*words: str, **changes: Any) -> Estimate:
    """The estimate of a configuration composed from words, for the facts above."""
    return estimate(configured(*words), facts(**changes))


def configured(*words: str) -> RunConfig:
    return configure("model=custom", "model.hub_id=a/b", "data=hh", *words)


def parts(found: Estimate) -> dict[str, float]:
    """The largest that each part gets, in GB, whatever the moment."""
    names = {name for moment in found.moments.values() for name in moment}
    return {n: max(m.get(n, 0.0) for m in found.moments.values()) / 1e9 for n in names}


def test_a_full_run_holds_sixteen_bytes_a_weight() -> None:
    found = parts(of("stage=sft"))
    assert found["weights"] == pytest.approx(4 * 8.03, rel=1e-3)
    assert found["gradients"] == pytest.approx(4 * 8.03, rel=1e-3)
    assert found["optimiser state"] == pytest.approx(8 * 8.03, rel=1e-3)
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
    one, eight = parts(of("stage=sft")), parts(on_eight("stage=sft"))
    for name in ("weights", "gradients", "optimiser state"):
        assert eight[name] == pytest.approx(one[name] / 8)
    assert eight["gathered blocks"] > 0
    assert eight["bf16 copies"] == 0


def test_a_quantised_base_is_whole_on_every_device() -> None:
    one, eight = of("stage=sft", "lora=qlora"), on_eight("stage=sft", "lora=qlora")
    adapters = 4 * adapter_parameters(LoraConfig(name="qlora"), LLAMA)
    saved = one.parts["weights"] - eight.parts["weights"]
    assert saved == pytest.approx(adapters * 7 / 8)
    assert eight.moments["the optimiser's step"]["optimiser state"] == adapters * 2 / 8


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


# ---------------------------------------------------------------- what makes it fit

LONG = {"step": 32 * 1024, "longest": 1024}


def advice(gib: float, *words: str, **changes: Any) -> list[Advice]:
    return advise(configured(*words), facts(**LONG, **changes), gib * GIB)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["stage=dpo", "stage.reference_logprobs=live"], {}),
        (["stage=sft"], {"shape": GPT2_XL}),
        (["stage=dpo", "lora=lora"], {}),
        (["stage=ppo-baseline", "reward_fn=length"], {"shape": GPT2_XL, "half": False}),
    ],
)
def test_every_candidate_makes_it_smaller_somewhere(words: list[str], changes: Any) -> None:
    config, known = configured(*words), facts(**LONG, **changes)
    before = estimate(config, known)
    found = list(candidates(config, known))
    assert len(found) >= 5
    for change in found:
        after = estimate(change.apply(config), known)
        assert after.total <= before.total, change.words
        both = before.moments.keys() & after.moments.keys()
        smaller = [m for m in both if weigh(after, m) < weigh(before, m)]
        assert smaller, change.words


def weigh(found: Estimate, moment: str) -> float:
    return sum(found.moments[moment].values())


@pytest.mark.parametrize(
    ("gib", "words", "changes"),
    [
        (60.0, ["stage=dpo", "lora=lora"], {}),
        (30.0, ["stage=dpo", "optim=rmsprop"], {"shape": GPT2_XL}),
        (24.0, ["stage=sft"], {"shape": GPT2_XL}),
        (150.0, ["stage=dpo", "stage.reference_logprobs=live"], {}),
        (22.0, ["stage=dpo", "lora=lora"], {}),
        (12.0, ["stage=sft"], {"shape": GPT2_XL}),
    ],
)
def test_what_is_advised_makes_it_fit_when_typed(
    gib: float, words: list[str], changes: Any
) -> None:
    known = facts(**LONG, **changes)
    assert estimate(configured(*words), known).total > gib * GIB
    found = advice(gib, *words, **changes)
    assert found
    for one in found:
        typed = [w for w in one.change.words.split() if not w.startswith("hardware.devices=")]
        config = configured(*words, *typed)
        count = re.search(r"hardware\.devices=(\d)", one.change.words)
        if count:  # composed, it would need that many devices here
            config = replace(config, hardware=replace(config.hardware, devices=int(count[1])))
        after = estimate(config, known).total
        assert after == pytest.approx(one.total), one.change.words
        assert after <= gib * GIB, one.change.words


def test_single_changes_come_mildest_first_and_once_each() -> None:
    found = [one.change.words for one in advice(60.0, "stage=dpo", "lora=lora")]
    assert found[0].startswith("train.micro_batch_tokens=")
    assert found[1] == "hardware.activation_checkpointing=1"
    assert len({words.partition("=")[0] for words in found}) == len(found)


def test_rounding_weights_comes_last_and_says_what_it_costs() -> None:
    found = advice(30.0, "stage=sft", "train.micro_batch_tokens=1024", shape=GPT2_XL)
    words = [one.change.words for one in found]
    assert words[-1] == "hardware.weights=bf16"
    assert "rounds" in found[-1].change.caveat
    assert "lora=lora" in words


def test_a_pair_where_no_single_change_does() -> None:
    (pair,) = advice(20.0, "stage=dpo", "lora=lora")
    assert pair.fits
    assert len(pair.change.words.split()) == 2


def test_nothing_makes_eight_billion_weights_fit_in_two_gib() -> None:
    (nearest,) = advice(2.0, "stage=dpo")
    assert not nearest.fits
    assert nearest.total < 0.2 * estimate(configured("stage=dpo"), facts(**LONG)).total


def test_on_a_cpu_more_processes_or_8_bit_states_are_no_remedy() -> None:
    config = configured("stage=sft")
    words = " ".join(c.words for c in candidates(config, facts(GPT2_XL, "cpu", False)))
    assert "devices" not in words
    assert "adamw8bit" not in words
    assert "weights=bf16" not in words  # computes in float32
    assert "lora=lora" in words


# ---------------------------------------------------------------- as it is told


def told(gib: float | None, *words: str) -> dict[str, str]:
    rows = memory_rows(configured(*words), facts(**LONG), None if gib is None else gib * GIB)
    return {name: str(value) for name, value in rows if name}


def test_the_table_adds_up() -> None:
    rows = memory_rows(configured("stage=sft"), facts(), 500.0 * GIB)
    sizes = {"GiB": 2**30, "MiB": 2**20}
    values = {name: str(value).split() for name, value in rows}
    total = values.pop("in all, a GPU")
    fits = values.pop("fits")
    parts_sum = sum(float(value[0]) * sizes[value[1]] for value in values.values())
    assert parts_sum == pytest.approx(float(total[0]) * GIB, rel=0.01)
    assert fits[0] == "yes,"


def test_told_where_it_does_not_fit_or_nobody_knows() -> None:
    rows = memory_rows(configured("stage=dpo", "lora=lora"), facts(**LONG), 60.0 * GIB)
    text = [f"{name} {value}".strip() for name, value in rows]
    at = text.index("remedy any one of these")
    assert text[at - 1] == "fits no, a GPU has 60.0 GiB"
    assert re.fullmatch(r"train\.micro_batch_tokens=\d+: \d+\.\d GiB", text[at + 1])
    assert told(None, "stage=dpo")["fits"].startswith("set hardware.memory_gb=")
    assert told(2.0, "stage=dpo")["remedy"] == "no two changes make it fit; nearest comes"
    assert "pair" in told(20.0, "stage=dpo", "lora=lora")["remedy"]


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "ppo-baseline", "sample", "evaluate"])
def test_a_dry_run_of_every_stage_that_runs_a_model(stage: str, tmp_path: Path) -> None:
    words = (*TINY, f"stage={stage}", f"run_dir={tmp_path}/x", "hardware.memory_gb=1")
    rollouts = ("stage.rollout_samples=8",) if stage == "ppo-baseline" else ()
    config = configure(*words, *rollouts)
    rows, memory = plan_tables(config)
    assert dict(rows)["device"] == "cpu, fp32"
    assert dict(memory)["fits"] == "yes, a process has 1.0 GiB"


def test_a_gpu_that_is_not_here_can_be_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = configure("stage=dpo", "model=tiny", "data.rows=40", "data.eval_rows=4",
                       "hardware=gpu-24gb", "run_dir=x")  # fmt: skip
    rows, memory = plan_tables(config)
    assert dict(rows)["device"] == "cuda, bf16"
    assert str(dict(memory)["fits"]).startswith("yes, a GPU has ")


def test_a_local_reward_model_is_counted(tmp_path: Path) -> None:
    reward = tmp_path / "reward"
    train(reward, "stage=reward", "train.max_steps=1", "stage.normalise_prompts=0")
    words = (*TINY, "stage=ppo-baseline", f"run_dir={tmp_path}/x", "stage.rollout_samples=8")
    config = configure(*words, "reward_fn=reward_model", f"reward_fn.path={reward}")
    with safe_open(reward / "final" / "model.safetensors", "pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert scorer_parameters(config) == weights
    assert dict(plan_tables(config)[1])["reward model"] == "0 MiB"
