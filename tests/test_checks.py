"""What a configuration may not combine; and that the schema agrees with the code."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from composing import composed, problems
from dpo_cli.config import (
    REWARD_FN_SCHEMAS,
    STAGES,
    ArchitectureConfig,
    RunConfig,
)
from dpo_cli.config.hints import TABLES, groups, known_facts, option_schema
from dpo_cli.config.keys import Fact, facts, within
from dpo_cli.config.read import prepare
from dpo_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("stage=dpo stage.beta=0", "stage.beta=0.0: must be above 0"),
        ("stage=dpo stage.label_smoothing=0.5", "stage.label_smoothing=0.5: must be in [0, 0.5)"),
        ("stage=dpo stage.loss=sigmiod", "stage.loss=sigmiod: must be one of sigmoid, "),
        (
            "stage=dpo stage.loss=hinge stage.label_smoothing=0.1",
            "stage.label_smoothing=0.1: has no effect with stage.loss=hinge; remove it",
        ),
        (
            "stage=dpo stage.loss=exo",
            "stage.label_smoothing=0: exo needs one above 0; its paper takes 0.001",
        ),
        (
            "stage=dpo stage.extra_losses={bcoo:0.2}",
            "stage.extra_losses: bcoo is none of sigmoid, ",
        ),
        (
            "stage=dpo stage.extra_losses={bco:-1}",
            "stage.extra_losses: the weight of bco must be a number above 0, at most 1e6, not -1",
        ),
        (
            "stage=dpo stage.loss=bco stage.divergence=forward_kl",
            "stage.divergence=forward_kl: has no effect with stage.loss=bco; remove it",
        ),
        (
            "stage=dpo stage.divergence_alpha=0.3",
            "stage.divergence_alpha=0.3: has no effect with stage.divergence=reverse_kl; remove",
        ),
        (
            "stage=dpo stage.loss=ipo stage.length_normalized=true",
            "stage.length_normalized=True: has no effect with stage.loss=ipo; remove it",
        ),
        (
            "stage=dpo stage.alpha=0.5",
            "stage.alpha=0.5: has no effect with stage.loss=sigmoid; remove it",
        ),
        (
            "stage=dpo stage.loss=unlikelihood stage.reference=gpt2",
            "stage.reference=gpt2: has no effect with stage.loss=unlikelihood; remove it",
        ),
        ("stage=dpo data=imdb", "data=imdb: has no preference pairs for stage=dpo"),
        ("stage=dpo data.responses=1", "data.responses=1: stage=dpo needs at least 2"),
        ("stage=reward data.responses=1", "data.responses=1: stage=reward needs at least 2"),
        ("stage=reward data=imdb", "data=imdb: has no preference pairs for stage=reward"),
        ("stage=reward stage.center_coefficient=-1", "stage.center_coefficient=-1.0: must be at"),
        (
            "stage=reward train.best_metric=rewards/accuracy",
            "train.best_metric=rewards/accuracy: must be one of loss, rewards/accuracies, ece; did",
        ),
        (
            "stage=sample stage.prompts=0 stage.eval_prompts=0",
            "stage.prompts=0, stage.eval_prompts=0: nothing to",
        ),
        (
            "stage=sample stage.temperatures=[0] stage.top_p=0.5",
            "stage.top_p=0.5: has no effect with stage.temperatures=[0.0]; remove it",
        ),
        ("stage=evaluate stage.method=optimum", "stage.method=optimum: reserved for the"),
        ("data=jsonl", "data=jsonl: no rows; set data.path=<file or folder>"),
        ("data=jsonl data.path=/no/such", "data.path=/no/such: no such file or folder"),
        ("+data.hub_id=x", "data.hub_id=x: has no effect with data=sentiment; remove it"),
        ("data.max_length=8 data.max_prompt_length=8", "data.max_prompt_length=8: must be below"),
        ("data.max_prompt_words=1", "data.max_prompt_words=1: must be at least data.min_prompt"),
        ("model=custom", "model=custom: no weights; set model.path=<folder> or model.hub_id="),
        ("model.path=/no/such", "model.path=/no/such: no such file or folder"),
        ("model.architecture.heads=3", "model.architecture.heads=3: must divide model.archit"),
        ("stage=dpo stage.reference=./no", "stage.reference=./no: no such folder"),
        ("stage=label", "stage.samples=null: nothing to label"),
        (
            "stage=evaluate reward_fn=lexicon reward_fn.positive=[] reward_fn.negative=[]",
            "reward_fn=lexicon: has no words; set reward_fn.path=",
        ),
        ("stage=frontier stage.evaluations=[.]", "stage.evaluations=.: has no points.jsonl; give"),
        ("stage=evaluate stage.prompts=0", "stage.prompts=0: nothing to evaluate"),
        ("stage=sample stage.top_p=0", "stage.top_p=0.0: must be in (0, 1]"),
        ("optim.lr=0", "optim.lr=0.0: nothing would be trained"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: must be two numbers in [0, 1)"),
        ("optim.alpha=0.5", "optim.alpha=0.5: has no effect with optim=adamw; remove it"),
        ("optim=rmsprop optim.betas=[0,0]", "optim.betas=[0.0, 0.0]: has no effect with optim=rm"),
        (
            "optim.warmup_steps=3 optim.warmup_ratio=0.5",
            "optim.warmup_ratio=0.5: has no effect with optim.warmup_steps=3",
        ),
        ("hardware.precision=fp16", "hardware.precision=fp16: not supported: log-probs overflow"),
        ("hardware.precision=bf61", "hardware.precision=bf61: must be one of auto, fp32, bf16; d"),
        ("hardware.devices=2 optim=adamw8bit", "optim=adamw8bit: cannot be sharded (hardware.de"),
        ("hardware.devices=2 model.attention=plain", "model.attention=plain: not supported with "),
        ("hardware.sharding=hybrid", "hardware.sharding=hybrid: replicates the weights across no"),
        ("train.epochs=.nan", "train.epochs=.nan: expected a number"),
        ("train.epochs=nan", "train.epochs=nan: must be above 0"),
        ("train.epochs=inf", "train.epochs=inf: must be at most 1e+06"),
    ],
)
def test_what_cannot_work_is_refused(overrides: str, expected: str) -> None:
    (line,) = problems(overrides.split())
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            "stage=reward train.sample_prompts=4",
            "train.sample_prompts=4: has no effect with stage=reward, which generates nothing",
        ),
        (
            "stage=sample hardware.compile=blocks",
            "hardware.compile=blocks: has no effect with stage=sample, which trains nothing",
        ),
        (
            "stage=sample train.max_steps=3",
            "train.max_steps=3: has no effect with stage=sample, wh",
        ),
        ("stage=evaluate optim.lr=1", "optim.lr=1.0: has no effect with stage=evaluate, which tr"),
        (
            "stage=sample model.path=. hardware.activation_checkpointing=1",
            "hardware.activation_checkpointing=1: has no effect with stage=sample, which trains",
        ),
        (
            "stage=evaluate hardware.weights=bf16",
            "hardware.weights=bf16: has no effect with stage=evaluate, which trains nothing",
        ),
        ("model.path=. model.revision=x", "model.revision=x: has no effect with model.path=.; rem"),
        ("model.path=. model.architecture.layers=2", "model.architecture.layers=2: has no effect"),
        ("model.path=. model.lr_scale=3", "model.lr_scale=3.0: has no effect with weights that a"),
        (
            "stage=label stage.samples=. stage.by=implicit model.path=. reward_fn=length",
            "reward_fn=length: has no effect with stage.by=implicit; remove it",
        ),
        (
            "stage=inspect hardware.devices=2",
            "hardware.devices=2: has no effect with stage=inspect, which runs in one process; rem",
        ),
        (
            "stage=sft data=jsonl data.path=. data.weight_field=w",
            "data.weight_field=w: has no effect with stage=sft; remove it",
        ),
        ("stage=dpo stage.loss=dpo", "stage.loss=dpo: DPO's own loss is called sigmoid"),
    ],
)
def test_typed_keys_that_nothing_reads(overrides: str, expected: str) -> None:
    (line,) = problems(overrides.split(), typed=overrides.split())
    assert line.startswith(expected)


@pytest.mark.parametrize(
    "overrides",
    [
        "stage=evaluate train.micro_batch_tokens=64",
        "stage=label stage.samples=. reward_fn=length train.micro_batch_tokens=64",
        "stage=sample train.batch_size=32",  # as it is anyway
        "stage=dpo train.max_steps=3 optim.lr=1",
        "model.architecture.layers=2 model.lr_scale=3",
        "stage=inspect optim=rmsprop",
        "stage=inspect hardware=gpus-8x80gb",
        "stage=sample hardware.devices=2 hardware.precision=fp32",
    ],
)
def test_typed_keys_that_are_read_or_change_nothing(overrides: str) -> None:
    prepare(composed(*overrides.split()), overrides.split())


@pytest.mark.parametrize(
    "words", ["stage=sample train.max_steps=3", "model.path=. model.revision=x"]
)
def test_keys_of_yaml_files_may_be_for_another_stage(words: str) -> None:
    prepare(composed(*words.split()))


def test_files_of_a_folder_to_come_may_be_missing(tmp_path: Path) -> None:
    cfg = composed(f"model.path={tmp_path / 'run/01-sft'}")
    prepare(cfg, coming=[tmp_path / "run"])
    with pytest.raises(ConfigError, match="no such file or folder"):
        prepare(cfg, coming=[tmp_path / "other"])


def test_evaluations_to_come_have_no_points_yet(tmp_path: Path) -> None:
    folder = tmp_path / "run/03-evaluate"
    folder.mkdir(parents=True)
    cfg = composed("stage=frontier", f"stage.evaluations=[{folder}]")
    prepare(cfg, coming=[tmp_path / "run"])
    with pytest.raises(ConfigError, match=r"03-evaluate: has no points\.jsonl"):
        prepare(cfg)


def test_all_problems_are_told_at_once() -> None:
    found = problems(["stage=dpo", "stage.beta=-1", "train.batch_size=0", "hardware.device=gpux"])
    assert found == [
        "hardware.device=gpux: must be one of auto, cpu, cuda",
        "stage.beta=-1.0: must be above 0",
        "train.batch_size=0: must be at least 1",
    ]


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [("[0, 0.5)", [0, 0.49], [-0.01, 0.5]), ("(0, 1]", [0.01, 1], [0, 1.01])],
)
def test_ends_of_intervals(interval: str, inside: list[float], outside: list[float]) -> None:
    problem = within(interval).problem
    assert not any(map(problem, inside))
    assert all(map(problem, [*outside, math.nan]))


def test_foreign_code_needs_the_command_line() -> None:
    word = "model.trust_remote_code=true"
    assert problems([word])[0].startswith("model.trust_remote_code=true: runs foreign code")
    assert prepare(composed(word), [word]).model.trust_remote_code


# ---------------------------------------------------------------- schema and code agree


def wrong(fact: Fact, value: Any) -> list[str]:
    """What a key's bound says of a value, or of each of a list."""
    assert fact.bound is not None
    said = map(fact.bound.problem, value if isinstance(value, list) else [value])
    return [problem for problem in said if problem]


def test_every_number_of_the_schema_has_an_upper_bound() -> None:
    """A number that no run can use is refused before anything is built of it."""
    free = {
        "optim.betas",  # checked as a pair
        "optim.max_grad_norm",  # inf: never clipped
    }
    schemas = [(f"{g}.", option_schema(g, o)) for g in groups() for o in TABLES.get(g, [""])]
    schemas += [("", RunConfig), ("model.architecture.", ArchitectureConfig)]
    numbers = [
        (f"{prefix}{field.name}", field.metadata["fact"])
        for prefix, schema in schemas
        for field in dataclasses.fields(schema)
        if re.match(r"(list\[)?(int|float)", field.type)  # a string: annotations are postponed
    ]
    assert {"train.batch_size", "stage.best_of", "seed"} <= {key for key, _ in numbers}
    for key, fact in numbers:
        for far in (10**400, 2.0**1000) if key not in free else ():
            assert wrong(fact, far), key
            assert "must be" in wrong(fact, far)[0], key
            assert fact.bound is not None
            assert wrong(fact, float("nan")), key


def test_every_key_says_what_it_means() -> None:
    assert [key for key, fact in known_facts() if len(fact.meaning) < 5] == []


def test_choices_and_defaults_agree() -> None:
    for group in groups():
        for option in TABLES.get(group, [""]):
            for name, value, fact in facts(option_schema(group, option)()):
                assert value is None or not fact.choices or value in fact.choices, name
                assert value is None or not fact.bound or wrong(fact, value) == [], name


def test_losses_read_the_options_they_are_said_to_read() -> None:
    from dpo_cli.config import DpoConfig
    from dpo_cli.losses import LOSSES

    keys = set(DpoConfig.__dataclass_fields__)
    assert all(loss.options <= keys for loss in LOSSES.values())


def test_choices_are_those_of_the_code() -> None:
    from dpo_cli.rewards.scorers import SCORERS
    from dpo_cli.stages import load_stage

    assert all(callable(load_stage(name)) for name in STAGES)
    assert set(REWARD_FN_SCHEMAS) == {
        *SCORERS,
        "classifier",
        "reward_model",
        "lexicon",
        "python",
        "none",
    }
