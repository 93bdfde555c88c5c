"""Whole runs: what they say of a model's attention, how long its rows may be, compiled steps."""

import math
import shutil

import pytest
import torch
import torch._inductor.config
from transformers import GPTJConfig, GPTJForCausalLM

from dpo_cli.errors import ConfigError
from dpo_cli.grammar.tokenizer import build_tokenizer
from dpo_cli.model import attention, forward
from dpo_cli.model.load import load_model
from dpo_cli.stages import rows, session
from small_models import FAMILIES, build, examples, gradients, packed, packed_loss
from small_runs import configure, metrics, train


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
        "tokens a micro-batch (grouped: it ignores the registered attention)"
    ]
    assert set(budgets) == {2048}
    assert metrics(tmp_path / "r")[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "kernel"), [((), "grouped"), (("model.attention=plain",), "plain")]
)
def test_rows_are_prepared_for_the_trained_model(tmp_path, monkeypatch, words, kernel):
    prepared = []
    real = rows.prepare
    monkeypatch.setattr(rows, "prepare", lambda row, k: prepared.append(k) or real(row, k))
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


def test_the_reference_knows_how_it_was_computed(gptj):
    """Cached log-probabilities of one kernel are not those of another, in their last digits."""
    config = configure("model=custom", f"model.path={gptj}", "model.attention=plain").model
    model = load_model(config, build_tokenizer(400))
    assert forward.computed_by(model) == "plain"
    forward.compile_rows(model)
    assert forward.computed_by(model) == "plain compiled"


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """One layer, which compiles in seconds, without what earlier tests have compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = build("gpt2", {**FAMILIES["gpt2"], "n_layer": 1}).float()
    attention.use(model, "sdpa")
    yield model
    torch._dynamo.reset()


@needs_compiler
def test_compiled_equals_eager_and_compiles_once_for_all_lengths(small):
    batches = [packed(examples(k)[first:]) for k, first in ((2, 0), (4, 0), (4, 1), (2, 1))]
    eager = [figures(small, batch) for batch in batches]
    names = set(small.state_dict())
    torch._dynamo.utils.counters.clear()
    forward.compile_rows(small)
    for batch, (loss, logprobs, grads) in zip(batches, eager, strict=True):
        found = figures(small, batch)
        torch.testing.assert_close(found[0], loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1], logprobs, rtol=0, atol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(found[2][name], grad, rtol=1e-5, atol=1e-5, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert set(small.state_dict()) == names


def figures(model, batch):
    loss, logprobs = packed_loss(model, batch)
    return loss.detach(), logprobs, gradients(model, loss)


def test_without_a_compiler_the_key_to_change_is_named(small, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/no/such/compiler"))
    forward.compile_rows(small)
    with pytest.raises(ConfigError, match=r"^hardware\.compile=true: .*hardware\.compile=false$"):
        forward.hidden_states(small, packed(examples(2)))


def test_a_run_compiles_if_told_to(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(session, "compile_rows", compiled.append)
    train(tmp_path / "a", "stage=sft", "train.max_steps=1")
    assert compiled == []
    train(tmp_path / "b", "stage=sft", "train.max_steps=1", "hardware.compile=true")
    assert len(compiled) == 1
