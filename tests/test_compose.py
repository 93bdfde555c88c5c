"""From YAML to a checked RunConfig: types, unknown keys, automatic values, cross-checks."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from composing import composed, problems
from dpo_cli.config import DpoConfig, SentimentDataConfig
from dpo_cli.config.hints import groups
from dpo_cli.config.read import build, finalize, prepare, refuse_targets
from dpo_cli.errors import ConfigError


def test_defaults_give_a_small_run_that_needs_no_file() -> None:
    config = prepare(composed())
    assert (config.stage.name, config.model.name, config.data.name) == ("sft", "tiny", "sentiment")
    assert config.model.architecture is not None
    assert config.model.architecture.layers == 4


# ---------------------------------------------------------------- types and keys


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_size=abc", "train.batch_size=abc: expected a whole number"),
        ("train.batch_size=2.5", "train.batch_size=2.5: expected a whole number"),
        ("train.batch_size=true", "train.batch_size=True: expected a whole number"),
        ("train.batch_size=null", "train.batch_size=None: expected a whole number"),
        ("train.epochs=many", "train.epochs=many: expected a number"),
        ("train.max_steps=x", "train.max_steps=x: expected a whole number or null"),
        ("train.shuffle=1", "train.shuffle=1: expected true or false"),
        ("optim.betas=0.9", "optim.betas=0.9: expected a list such as [a number, ...]"),
        (
            "hardware.device=2",
            "hardware.device=2: expected text; put it in quotes; did you mean hardware.devices=2?",
        ),
        ("lora=lora +lora.rank=8", "lora.rank: unknown key; did you mean lora.r?"),
        ("lora=lora +lora.lora_alpha=8", "lora.lora_alpha: unknown key; did you mean lora.alpha?"),
        ("+lora.lora_dropout=0.1", "lora.lora_dropout: unknown key; did you mean lora.dropout?"),
        ("+lora.quantisation=x", "lora.quantization=x: must be one of nf4, int8"),
        ("logger.progress=false", "logger.progress=False: expected text; put it in quotes"),
        (
            "reward_fn=classifier reward_fn.label=1.5",
            "reward_fn.label=1.5: expected text or a whole number or null",
        ),
        ("model.revision=7e1", "model.revision=70.0: expected text; put it in quotes or null"),
        ("model.architecture.layers=x", "model.architecture.layers=x: expected a whole number"),
        ("model.architecture=3", "model.architecture=3: expected a group of keys"),
    ],
)
def test_a_wrong_type_is_told_with_its_full_path(override: str, expected: str) -> None:
    assert problems(override.split()) == [expected]


def test_one_text_is_a_list_of_it() -> None:
    assert build(composed("lora=lora", "lora.target_modules=q_proj")).lora.target_modules == [
        "q_proj"
    ]
    assert build(composed("stage=evaluate", "stage.policies=runs/a")).stage.policies == ["runs/a"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e3", 1000), ("'7'", 7), ("12345678901234567890", 12345678901234567890)],
)
def test_whole_numbers_in_other_clothes(text: str, value: int) -> None:
    assert build(composed(f"train.max_steps={text}")).train.max_steps == value


def test_a_number_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE", "1e-5")
    assert build(composed("optim.lr=${oc.env:RATE}")).optim.lr == 1e-5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+train.batchsize=3", "train.batchsize: unknown key; did you mean train.batch_size?"),
        ("+typo=3", "typo: unknown key; see dpo-run --cfg job"),
        ("+sed=3", "sed: unknown key; did you mean seed?"),
        ("+lr=3", "lr: unknown key; did you mean optim.lr?"),
        (
            "+model.architecture.layer=3",
            "model.architecture.layer: unknown key; did you mean model.architecture.layers?",
        ),
        (
            "+stage.beta=3",
            "stage.beta: not a key of stage=sft; it belongs to stage=dpo, stage=kto, "
            "stage=online-dpo, stage=label",
        ),
        (
            "+stage.bta=3",
            "stage.bta: unknown key; did you mean stage.beta, a key of stage=dpo, stage=kto, "
            "stage=online-dpo, stage=label?",
        ),
        ("stage.name=dop", "stage.name=dop: unknown; did you mean dpo?"),
    ],
)
def test_an_unknown_key_is_told_with_what_was_meant(override: str, expected: str) -> None:
    assert problems([override]) == [expected]


def test_unknown_keys_and_wrong_types_are_told_together() -> None:
    found = problems(["+train.x=1", "+stage.y=2", "train.epochs=z"])
    assert [line.split(":")[0] for line in found] == ["stage.y", "train.x", "train.epochs=z"]


def test_keys_absent_from_yaml_keep_their_defaults() -> None:
    cfg = OmegaConf.create({group: {} for group in groups()})
    cfg.stage = {"name": "dpo"}
    cfg.data = cfg.reward_fn = {"name": "sentiment"}
    cfg.judge = {"name": "reward_fn"}
    config = build(cfg)
    assert config.stage == DpoConfig()
    assert config.data == SentimentDataConfig()


def test_a_missing_group_is_told() -> None:
    cfg = composed()
    values = OmegaConf.create({k: v for k, v in cfg.items() if k != "optim"})
    with pytest.raises(ConfigError, match=r"^optim: missing$"):
        build(values)


def test_interpolations_are_resolved_once() -> None:
    config = build(composed("seed=7", "logger.wandb_project=p-${seed}"))
    assert config.logger.wandb_project == "p-7"


def test_a_broken_interpolation_names_its_key() -> None:
    (line,) = problems(["logger.wandb_project=${nowhere}"])
    assert line.startswith("logger.wandb_project: ")


@pytest.mark.parametrize("override", ["+train.x._target_=os.system", "+_target_=os.system"])
def test_no_target_is_accepted(override: str) -> None:
    (line,) = problems([override])
    assert "_target_: a config may not name code to run" in line


def test_a_target_deep_in_lists_is_found() -> None:
    with pytest.raises(ConfigError, match=r"^a\.1\.b\._target_: "):
        refuse_targets({"a": [1, {"b": {"_target_": "x"}}]})


# ---------------------------------------------------------------- automatic values


def test_learning_rate_is_the_stages_times_the_models_scale() -> None:
    assert prepare(composed("stage=sft")).optim.lr == pytest.approx(1e-5 * 100)
    assert prepare(composed("stage=dpo")).optim.lr == pytest.approx(1e-6 * 100)
    assert prepare(composed("stage=dpo", "model=gpt2")).optim.lr == pytest.approx(1e-6)
    assert prepare(composed("optim.lr=3e-4")).optim.lr == 3e-4


def test_sentiment_responses_follow_the_stage() -> None:
    def responses(*overrides: str) -> int | None:
        data = prepare(composed(*overrides)).data
        assert isinstance(data, SentimentDataConfig)
        return data.responses

    assert responses("stage=sft") == 1
    assert responses("stage=dpo") == 2
    assert responses("stage=dpo", "data.responses=4", "stage.loss=plackett_luce") == 4


def test_home_and_cache_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    monkeypatch.delenv("DPO_RUN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    config = prepare(composed("model.path='~/weights'", "run_dir='~/r'"))
    assert config.model.path == str(tmp_path / "weights")
    assert config.run_dir == str(tmp_path / "r")
    assert config.cache_dir == str(tmp_path / ".cache/dpo-run")
    monkeypatch.setenv("DPO_RUN_CACHE", "/fast")
    assert finalize(build(composed())).cache_dir == "/fast"
    assert finalize(build(composed("cache_dir=/mine"))).cache_dir == "/mine"


def test_a_mapping_takes_keys_of_its_own() -> None:
    config = prepare(
        composed("data=jsonl", "data.path=.", "data.chat_template_kwargs={thinking: false}")
    )
    assert config.data.chat_template_kwargs == {"thinking": False}
    config = prepare(composed("stage=dpo", "stage.extra_losses.bco=0.2"))
    assert config.stage.extra_losses == {"bco": 0.2}
