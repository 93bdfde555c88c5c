"""`dpo-run convert`: settings of other tools as a command, which composes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from composing import composed
from dpo_cli.cli import main
from dpo_cli.config.hints import groups, known_facts, root_keys
from dpo_cli.config.peers import CHANGED, SAME, WITHOUT
from dpo_cli.config.read import prepare
from dpo_cli.errors import ConfigError

TRL = """
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: trl-lib/ultrafeedback_binarized
dataset_train_split: train
learning_rate: 5e-7
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
beta: 0.1
loss_type: exo_pair
label_smoothing: 0.001
max_length: 1024
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
logging_steps: 10
eval_strategy: steps
eval_steps: 50
output_dir: runs/qwen-dpo
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: all-linear
precompute_ref_log_probs: true
report_to: [wandb]
dataset_num_proc: 4
hub_model_id: me/mine
"""
AXOLOTL = """
base_model: ./base
datasets:
  - path: pairs.jsonl
    ds_type: json
    type: chat_template
    split: train
val_set_size: 0.1
rl: dpo
rl_beta: 0.2
sequence_len: 2048
sample_packing: true
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_target_linear: true
micro_batch_size: 4
gradient_accumulation_steps: 2
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: linear
learning_rate: 0.00002
bf16: auto
flash_attention: true
saves_per_epoch: 1
output_dir: ./out
"""
LLAMA_FACTORY = """
stage: dpo
do_train: true
model_name_or_path: base
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
pref_beta: 0.1
pref_loss: orpo
dataset: mine
dataset_dir: data
template: llama3
cutoff_len: 2048
max_samples: 1000
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
save_steps: 500
warmup_ratio: 0.1
val_size: 0.1
bf16: true
resume_from_checkpoint: null
"""


def told(words: list[str]) -> list[str]:
    """What is wrong with a command beside files that a test does not have."""
    try:
        prepare(composed(*words))
    except ConfigError as error:
        return [line for line in str(error).splitlines() if "no such" not in line]
    return []


def converted(
    capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[dict[str, str], dict[str, str], str]:
    """Overrides, what was left with its reason, and the line of the count."""
    main(["convert", *words])
    out, err = capsys.readouterr()
    command = shlex.split(out.replace("\\\n", " "))
    assert command[0] == "dpo-run"
    assert told(command[1:]) == []
    count, *left = err.splitlines()
    pairs = dict(word.split("=", 1) for word in command[1:])
    return pairs, dict(line.strip().split(": ", 1) for line in left), count


def test_trl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(TRL)
    words, left, count = converted(capsys, str(tmp_path / "c.yaml"))
    assert words == {
        "stage": "dpo", "stage.loss": "exo", "model": "custom",
        "model.hub_id": "Qwen/Qwen3-0.6B", "data": "jsonl",
        "data.hub_id": "trl-lib/ultrafeedback_binarized", "lora": "lora",
        "lora.target_modules": "[all-linear]", "train.batch_size": "16",
        "hardware.precision": "bf16", "hardware.activation_checkpointing": "1",
        "optim.schedule": "cosine", "logger.wandb": "true", "data.train_split": "train",
        "optim.lr": "5e-07", "train.epochs": "1", "stage.beta": "0.1",
        "stage.label_smoothing": "0.001", "data.max_length": "1024", "optim.warmup_ratio": "0.1",
        "train.log_every_steps": "10", "train.eval_every_steps": "50", "run_dir": "runs/qwen-dpo",
        "lora.r": "32", "lora.alpha": "16",
    }  # fmt: skip
    assert count == "carried 23 of 27 settings of TRL"
    assert left == {
        "eval_strategy": "training, evaluation and plots are on",
        "precompute_ref_log_probs": "the reference's log-probs are computed once and cached",
        "dataset_num_proc": "rows are encoded once and cached",
        "hub_model_id": "stage=export stage.push_to_hub=owner/name uploads a model",
    }


def test_axolotl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(AXOLOTL)
    (tmp_path / "pairs.jsonl").write_text("{}")
    words, left, count = converted(capsys, str(tmp_path / "c.yaml"))
    assert words == {
        "stage": "dpo", "stage.loss": "sigmoid", "model": "custom", "model.path": "./base",
        "data": "jsonl", "data.path": "pairs.jsonl", "data.train_split": "train", "lora": "qlora",
        "lora.target_modules": "[all-linear]", "train.batch_size": "8", "optim": "adamw8bit",
        "optim.schedule": "linear", "data.eval_rows": "0.1", "stage.beta": "0.2",
        "data.max_length": "2048", "lora.r": "16", "train.epochs": "2", "optim.lr": "2e-05",
        "run_dir": "./out",
    }  # fmt: skip
    assert count.endswith("settings of axolotl")
    assert left.keys() == {
        "datasets.type", "sample_packing", "flash_attention", "saves_per_epoch"
    }  # fmt: skip


def test_llama_factory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(LLAMA_FACTORY)
    (tmp_path / "base").mkdir()
    (tmp_path / "data").mkdir()
    columns = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
    info = {"mine": {"file_name": "own.json", "ranking": True, "columns": columns}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    words, left, _ = converted(capsys, str(tmp_path / "c.yaml"))
    assert words["stage.loss"] == "orpo"
    assert words["data.path"] == str(tmp_path / "data" / "own.json")
    assert [words[f"data.{k}_field"] for k in ("prompt", "chosen", "rejected")] == [
        "ask", "yes", "no"
    ]  # fmt: skip
    assert (words["model.path"], words["train.batch_size"]) == ("base", "8")
    assert words["lora.target_modules"] == "[q_proj,v_proj]"
    assert (words["data.eval_rows"], words["data.max_rows"]) == ("0.1", "1000")
    assert left.keys() == {"do_train", "template"}


def test_words_of_the_reference_code(capsys: pytest.CaptureFixture[str]) -> None:
    words, left, _ = converted(
        capsys, "model=pythia28", "datasets=[hh]", "loss=dpo", "loss.beta=0.1", "batch_size=64",
        "gradient_accumulation_steps=2", "trainer=FSDPTrainer", "lr=5e-7", "exp_name=x",
        "optimizer=RMSprop", "model.archive=sft/policy.pt",
    )  # fmt: skip
    assert words == {
        "stage": "dpo", "stage.loss": "sigmoid", "model": "pythia-2.8b",
        "model.path": "sft/policy.pt", "data": "hh", "train.batch_size": "64", "optim": "rmsprop",
        "stage.beta": "0.1", "optim.lr": "5e-07",
    }  # fmt: skip
    assert left.keys() == {"trainer", "exp_name"}


@pytest.mark.parametrize(
    ("text", "stage", "left"),
    [
        ("base_model: a/b\nlearning_rate: 1e-5\nrl_beta: 0.1", "sft", {"rl_beta"}),
        ("base_model: a/b\nrl: kto", "kto", set()),
        ("base_model: a/b\nrl: grpo", "dpo", {"rl"}),
        ("stage: rm\nmodel_name_or_path: a/b", "reward", set()),
        ("model_name_or_path: a/b\nmax_steps: -1\nsave_steps: 0.1", "sft",
         {"(trainer)", "save_steps"}),
        ("model_name_or_path: a/b\nbeta: 0.1\nfp16: true\noptim: lion\nloss_type: sft", "dpo",
         {"fp16", "optim", "loss_type"}),
        ("model_name_or_path: a/b\ndesirable_weight: 1.5", "kto", {"(trainer)"}),
    ],
)  # fmt: skip
def test_what_is_left_has_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, stage: str, left: set[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    words, found, _ = converted(capsys, str(tmp_path / "c.yaml"))
    assert words["stage"] == stage
    assert found.keys() == left


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "has no settings, key: value"),
        ("stage: pt\nmodel_name_or_path: x", "stage pt: nothing of dpo-run does this"),
        ("a: *b", "the alias *b is undefined"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(tmp_path / "c.yaml")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "text",
    [
        "dataset_mixer: {a/b: 1.0}\ndataset_splits: [train_prefs, test_prefs]",
        "dataset_mixture: {datasets: [{id: a/b, split: train_prefs}]}\n"
        "dataset_test_split: test_prefs",
    ],
)
def test_a_mixture_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "c.yaml").write_text(f"model_name_or_path: a/b\nloss_type: ipo\n{text}")
    words, left, _ = converted(capsys, str(tmp_path / "c.yaml"))
    assert left == {}
    assert words["data.hub_id"] == "a/b"
    assert words["data.train_split"] == "train_prefs"
    assert words["data.eval_split"] == "test_prefs"


def test_a_mixture_of_several_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("loss_type: ipo\ndataset_mixer: {a/b: 1.0, c/d: 0.5}")
    _, left, _ = converted(capsys, str(tmp_path / "c.yaml"))
    assert left == {"dataset_mixer": "one data set at a time: data.path or data.hub_id"}


def test_hostile_values_are_quoted_and_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(
        'loss_type: ipo\noutput_dir: "$(touch x); `y` \\e[31m"\n"a\\e[0m": 1\n'
    )
    main(["convert", str(tmp_path / "c.yaml")])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    words = shlex.split(out.replace("\\\n", " "))
    assert [w for w in words if "touch" in w] == ["run_dir='$(touch x); `y` \\x1b[31m'"]


def test_each_counterpart_is_a_key() -> None:
    known = {*root_keys(), *(key for key, _ in known_facts())}
    assert set(SAME.values()) <= known
    assert not (SAME.keys() & CHANGED.keys() | SAME.keys() & WITHOUT.keys())
    assert not CHANGED.keys() & WITHOUT.keys()
    assert not WITHOUT.keys() & {*known, *groups()}


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("learning_rate=1e-5", "learning_rate: unknown key; that is optim.lr here"),
        ("num_train_epochs=3", "num_train_epochs: unknown key; that is train.epochs here"),
        ("deepspeed=ds.json", "deepspeed: unknown key; hardware.devices=N shards by FSDP2"),
        ("lora_target=all", "lora_target: unknown key; that is lora.target_modules here"),
    ],
)
def test_a_typed_key_of_another_tool_is_answered(
    capsys: pytest.CaptureFixture[str], typed: str, told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["stage=dpo", typed])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {told}"]
