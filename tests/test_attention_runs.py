"""Whole runs: what they say of a model's attention and how long its rows may be."""

import math
import shutil

import pytest
from transformers import GPTJConfig, GPTJForCausalLM

from dpo_cli.errors import ConfigError
from dpo_cli.grammar.tokenizer import build_tokenizer
from dpo_cli.session import rows
from small_runs import metrics, train


@pytest.fixture(scope="module")
def gptj(tmp_path_factory):
    """A model whose attention is not transformers' interface."""
    folder = tmp_path_factory.mktemp("attention") / "gptj"
    tokenizer = build_tokenizer(400)
    shape = GPTJConfig(
        vocab_size=len(tokenizer), n_positions=256, n_embd=16, n_layer=2, n_head=2, rotary_dim=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTJForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_slow_fallback_is_told_and_keeps_rows_short(gptj, tmp_path, capsys, monkeypatch):
    budgets = []
    real = rows.pack_all

    def recorded(examples, indices, token_budget, *rest):
        budgets.append(token_budget)
        return real(examples, indices, token_budget, *rest)

    monkeypatch.setattr(rows, "pack_all", recorded)
    train(tmp_path / "r", "stage=dpo", f"model.path={gptj}", "train.max_steps=2",
          "train.micro_batch_tokens=100000", "logger.progress=plain")  # fmt: skip
    told = [line for line in capsys.readouterr().err.splitlines() if "attention=" in line]
    assert told == [
        "model.path: GPTJForCausalLM runs with attention=dense, slower than packed, at most 2,048 "
        "tokens per micro-batch (grouped: it ignores the registered attention)"
    ]
    assert set(budgets) == {2048}
    assert metrics(tmp_path / "r")[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "kernel"), [((), "grouped"), (("model.attention=plain",), "plain")]
)
def test_rows_are_prepared_for_the_trained_model(tmp_path, monkeypatch, words, kernel):
    prepared = []
    real = rows.prepare_layout
    monkeypatch.setattr(rows, "prepare_layout", lambda row, k: prepared.append(k) or real(row, k))
    train(tmp_path / "r", "stage=sft", "train.max_steps=1", *words)
    assert set(prepared) == {kernel}


def test_models_that_attend_packed_rows_say_nothing(tmp_path, capsys):
    train(tmp_path / "r", "stage=sft", "train.max_steps=1", "logger.progress=plain")
    said = capsys.readouterr().err
    assert "1 steps" in said or "saved" in said
    assert "attention" not in said


def test_an_impossible_kernel_is_refused_before_the_weights_are_read(gptj, tmp_path):
    broken = shutil.copytree(gptj, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=r"^model\.attention=varlen: needs a CUDA device.*$"):
        train(tmp_path / "r", "stage=sft", f"model.path={broken}", "model.attention=varlen")


def test_a_kernel_the_model_cannot_use_is_refused(gptj, tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.attention=sdpa: GPTJForCausalLM cannot .*$"):
        train(tmp_path / "r", "stage=sft", f"model.path={gptj}", "model.attention=sdpa")
