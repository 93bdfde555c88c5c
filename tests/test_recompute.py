"""Activation checkpointing: the same gradients from fewer kept tensors."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cli.errors import ConfigError
from dpo_cli.model.attention import interface
from dpo_cli.model.dropout import set_dropout
from dpo_cli.model.recompute import recompute_blocks
from small_models import FAMILIES, build, examples, gradients, packed, packed_loss
from small_runs import metrics, train

LAYERS = 4
GPT2 = {**FAMILIES["gpt2"], "n_layer": LAYERS}
LLAMA = {**FAMILIES["llama"], "num_hidden_layers": LAYERS}


def model_of(family, kernel="grouped", dropout=0.0, layers=LAYERS):
    options = {"gpt2": GPT2 | {"n_layer": layers}, "llama": LLAMA}.get(family, FAMILIES[family])
    model = build(family, options).float()
    interface.use_kernel(model, kernel)
    set_dropout(model, dropout)  # which decides what trains, too
    return model.train()


def loss_and_gradients(model, batch):
    """And how many values autograd keeps between forward and backward."""
    kept = []
    torch.manual_seed(5)
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss, _ = packed_loss(model, batch)
    return loss.detach(), gradients(model, loss), sum(kept)


def assert_the_same(ours, plain):
    assert torch.equal(ours[0], plain[0])
    assert ours[1].keys() == plain[1].keys()
    for name, grad in ours[1].items():
        assert torch.equal(grad, plain[1][name]), name


@pytest.mark.parametrize("kernel", ["grouped", "sdpa", "dense", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_the_same_to_the_last_bit(kernel, dropout):
    plain = loss_and_gradients(model_of("gpt2", kernel, dropout), packed(examples(3)))
    for every in (1, 2, 3):
        model = model_of("gpt2", kernel, dropout)
        recompute_blocks(model, every)
        ours = loss_and_gradients(model, packed(examples(3)))
        assert_the_same(ours, plain)
        assert ours[2] < plain[2]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj", "gemma2", "mixtral", "phi3"])
def test_other_families_too(family):
    kernel = "plain" if family == "gptj" else "sdpa"
    plain = loss_and_gradients(model_of(family, kernel), packed(examples(2)))
    model = model_of(family, kernel)
    recompute_blocks(model, 1)
    ours = loss_and_gradients(model, packed(examples(2)))
    assert_the_same(ours, plain)
    assert ours[2] < plain[2]


def test_every_kth_block_from_the_first():
    runs = []
    kept = {}
    for every in (0, 1, 2, 3):
        model = model_of("gpt2")
        blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        assert len(blocks) == LAYERS
        for number, block in enumerate(blocks):
            block.attn.register_forward_hook(lambda *_, n=number: runs.append(n))
        if every:
            recompute_blocks(model, every)
        runs.clear()
        *_, kept[every] = loss_and_gradients(model, packed(examples(2)))
        twice = sorted(n for n in range(LAYERS) if runs.count(n) == 2)
        expected = {0: [], 1: [0, 1, 2, 3], 2: [0, 2], 3: [0, 3]}
        assert twice == expected[every]
    assert kept[1] < kept[2] == kept[3] < kept[0]
    # what a block would keep, apart from the hidden state that it keeps now
    assert (kept[0] - kept[2]) * 2 == kept[0] - kept[1]


def test_under_a_frozen_base_where_no_block_input_needs_a_gradient():
    """As with adapters: the first trained vector is inside the first block."""

    def model():
        made = model_of("gpt2").requires_grad_(False)
        for block in made.transformer.h:
            block.ln_2.weight.requires_grad_(True)
        return made

    plain = loss_and_gradients(model(), packed(examples(2)))
    ours = model()
    recompute_blocks(ours, 1)
    found = loss_and_gradients(ours, packed(examples(2)))
    assert_the_same(found, plain)
    assert set(found[1]) == {f"transformer.h.{i}.ln_2.weight" for i in range(LAYERS)}
    assert all(float(g.abs().max()) > 0 for g in found[1].values())


def test_autocast_is_the_same_in_the_second_forward():
    def run(every):
        model = model_of("llama", "sdpa")
        if every:
            recompute_blocks(model, every)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = packed_loss(model, packed(examples(2)))
        return loss.detach(), gradients(model, loss)

    assert_the_same(run(1), run(0))


def test_evaluation_keeps_its_cache_and_runs_once():
    model = model_of("gpt2").eval()
    recompute_blocks(model, 1)
    interface.use_kernel(model, "sdpa")
    with torch.no_grad(), interface.attention_as(model, "sdpa"):
        out = model(input_ids=torch.arange(5)[None], use_cache=True)
    assert out.past_key_values.get_seq_length() == 5


def test_a_family_that_cannot(monkeypatch):
    model = model_of("gpt2")
    monkeypatch.setattr(PreTrainedModel, "supports_gradient_checkpointing", False)
    monkeypatch.delattr(type(model).__mro__[1], "supports_gradient_checkpointing", raising=False)
    with pytest.raises(
        ConfigError,
        match=r"^hardware\.activation_checkpointing=2: GPT2LMHeadModel does not .*; use .*=0.*$",
    ):
        recompute_blocks(model, 2)


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_whole_runs_are_the_same(stage, tmp_path):
    words = (f"stage={stage}", "train.max_steps=3", "optim.lr=1e-3", "model.dropout=0.1",
             "train.sample_prompts=0")  # fmt: skip
    for every in (0, 1):
        train(tmp_path / str(every), *words, f"hardware.activation_checkpointing={every}")
    plain, ours = (
        [row["loss"] for row in metrics(tmp_path / every) if "loss" in row] for every in "01"
    )
    assert len(ours) == 3
    assert ours == plain
