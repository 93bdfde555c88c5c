"""What would make a run fit, and how it is told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dpo_cli.config import RunConfig
from dpo_cli.errors import ConfigError
from dpo_cli.plan.memory.advice import Advice, advise, candidates
from dpo_cli.plan.memory.estimate import Estimate, estimate
from dpo_cli.plan.memory.table import memory_rows
from memory_runs import GIB, GPT2_XL, configured, facts

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
        after = estimate(configured(*words, *one.change.words.split()), known).total
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
    assert "rounding" in found[-1].change.caveat
    assert "lora=lora" in words


def test_what_the_checks_refuse_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: RunConfig) -> None:
        if config.hardware.activation_checkpointing:
            raise ConfigError("hardware.activation_checkpointing=1: not with this")

    recompute = "hardware.activation_checkpointing=1"
    words = ("stage=dpo", "lora=lora")
    assert recompute in [one.change.words for one in advice(60.0, *words)]
    monkeypatch.setattr("dpo_cli.plan.memory.advice.check", refuse)
    assert advice(60.0, *words)
    for limit in (60.0, 20.0):
        assert all(recompute not in one.change.words for one in advice(limit, *words))


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
    total = values.pop("total per GPU")
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
    assert told(None, "stage=dpo")["fits"].startswith("unknown: set hardware.memory_gb=")
    assert told(2.0, "stage=dpo")["remedy"] == "no two changes make it fit; the closest is"
    assert "pair" in told(20.0, "stage=dpo", "lora=lora")["remedy"]
