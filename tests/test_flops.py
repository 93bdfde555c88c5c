"""FLOPs of a step: by hand, and as PyTorch counts them; the peaks; what a run logs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from dpo_cli.model import forward
from dpo_cli.model.attention import interface
from dpo_cli.packing import pack
from dpo_cli.records import EncodedExample, Segment
from dpo_cli.train import flops, loop
from dpo_cli.train.flops import Sizes, Work, peak_tflops, sizes_of, speed_figures, step_flops
from small_models import FAMILIES, GPT2_LIKE, NO_DROPOUT, SMALL
from small_runs import metrics, train

WIDE = {**SMALL, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6}
SHAPES = {
    "gpt2": {**GPT2_LIKE, **NO_DROPOUT, "n_embd": 64, "n_layer": 6},
    "llama": WIDE,
    "qwen3": {**WIDE, "head_dim": 32},
    "gpt_neox": {**WIDE, "hidden_dropout": 0.0, "attention_dropout": 0.0},
}


def model_of(family, options=None, auto=AutoModelForCausalLM, **more):
    config = AutoConfig.for_model(family, **(options or SHAPES[family]), **more)
    model = auto.from_config(config, attn_implementation="eager")
    interface.use_kernel(model, "dense")
    return model


def row():
    """Two examples of 12 + (7 - 1) + (5 - 1) and 4 + (9 - 1) + (3 - 1) tokens."""
    ids = np.random.default_rng(0).integers(0, 96, 40).astype(np.int32)
    return pack([EncodedExample(ids[:12], (ids[12:19], ids[:5]), 0),
                 EncodedExample(ids[3:7], (ids[7:16], ids[:3]), 1)], [0, 1])  # fmt: skip


def counted(model, batch):
    """FLOPs of forward, head and backward of a row, as PyTorch counts them."""
    with FlopCounterMode(display=False) as first:
        hidden = forward.hidden_states(model, batch)
    rows = hidden.index_select(0, batch.source_index)
    with FlopCounterMode(display=False) as head:
        loss, _ = forward.fused_loss(
            rows, forward.head_of(model), batch.targets, batch.counts,
            lambda logprobs, _: -logprobs.sum(),
        )  # fmt: skip
    with FlopCounterMode(display=False) as behind:
        loss.backward()
    return [mode.get_total_flops() for mode in (first, head, behind)]


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_flops_are_those_that_pytorch_counts(family):
    """The dense kernel computes the scores of all pairs of tokens, also of hidden ones."""
    model, batch = model_of(family), row()
    sizes, work = Sizes.of(model), Work.of(batch)
    all_pairs = replace(work, visible=work.tokens**2, near=work.tokens**2)
    parts = step_flops(sizes, all_pairs)
    assert [parts["forward"], parts["head and loss"], parts["backward"]] == counted(model, batch)
    assert parts["step"] == sum(parts[k] for k in ("forward", "head and loss", "backward"))
    assert 0.8 < step_flops(sizes, work)["step"] / parts["step"] < 1.0  # what need not be


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_frozen_weights_get_no_gradient(family):
    """Of each block the last matrix is trained. Less is done than counted, by at most a block's
    part of six: nothing goes back beyond the first trained matrix."""
    model, batch = model_of(family).requires_grad_(False), row()
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    for block in blocks:
        last = block.mlp.c_proj if family == "gpt2" else block.mlp.down_proj
        last.weight.requires_grad_(True)
    sizes, work = Sizes.of(model), Work.of(batch)
    parts = step_flops(sizes, replace(work, visible=work.tokens**2, near=work.tokens**2))
    first, head, behind = counted(model, batch)
    assert parts["forward"] == first
    assert parts["head and loss"] == head == 2 * parts["logits"]
    assert behind < parts["backward"] < behind / (1 - 1 / 6)
    assert parts["backward"] < 1.5 * parts["forward"]  # with all trained: 2


def test_a_step_by_hand():
    """GPT-2 of 2 layers x 32: 12 D^2 a layer; 32 tokens, 22 targets."""
    model = model_of("gpt2", {**GPT2_LIKE, **NO_DROPOUT})
    batch = row()
    visible = (78 + (12 * 6 + 21) + (12 * 4 + 10)) + (10 + (4 * 8 + 36) + (4 * 2 + 3))
    assert Work.of(batch) == Work(tokens=36, scored=24, visible=visible, near=visible)
    forward_flops = 2 * 36 * 2 * 12 * 32**2 + 2 * 4 * visible * 32
    logits = 2 * 24 * 32 * 96
    figures = speed_figures(sizes_of(model), [batch, batch], 1, 0.5, peak=2.0)
    step = 2 * (3 * forward_flops + 3 * logits + forward_flops + logits)
    assert figures["tflops_per_second"] == pytest.approx(step / 0.5 / 1e12)
    assert figures["mfu"] == pytest.approx(step / 0.5 / 2e12)
    assert "mfu" not in speed_figures(sizes_of(model), [batch], 0, 0.5, peak=None)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_a_branch_sees_its_prompt_and_itself(window):
    """Every pair of tokens, one by one."""
    segment = Segment(start=5, prompt=6, branches=(2, 7, 0))
    tokens = [("prompt", i, i) for i in range(6)]
    tokens += [(b, 6 + i, i) for b, size in enumerate(segment.branches) for i in range(size)]
    seen = [
        (query, key)
        for place, query in enumerate(tokens)
        for key in tokens[: place + 1]
        if key[0] in ("prompt", query[0]) and (window is None or query[1] - key[1] < window)
    ]
    assert flops.visible_pairs(segment, window) == len(seen)


def test_windows_are_those_of_the_layers():
    mistral = Sizes.of(model_of("mistral", FAMILIES["mistral"]))
    assert (mistral.window, mistral.windowed_layers, mistral.layers) == (6, 2, 2)
    gemma = model_of("gemma2", FAMILIES["gemma2"])
    kinds = gemma.config.layer_types
    assert Sizes.of(gemma).windowed_layers == kinds.count("sliding_attention") == 1
    assert Sizes.of(model_of("llama")).window is None
    batch = row()
    work = Work.of(batch, 6)
    assert work.near < work.visible
    part = step_flops(Sizes.of(gemma), work)["attention forward"]
    assert part == 4 * (work.visible + work.near) * Sizes.of(gemma).attention_width


def test_a_reward_models_score_is_no_vocabulary():
    model = model_of("llama", {**SMALL, "num_labels": 1}, AutoModelForSequenceClassification)
    parts = step_flops(Sizes.of(model), Work.of(row()))
    assert parts["logits"] == 0
    assert parts["step"] == 3 * parts["forward"]


def test_quantised_weights_count_by_their_shape():
    class Packed(torch.nn.Linear):
        """As bitsandbytes: two values a byte."""

        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs, bias=False)
            self.weight = torch.nn.Parameter(
                torch.zeros(inputs * outputs // 2, 1, dtype=torch.uint8), requires_grad=False
            )

    model = model_of("llama")
    plain = Sizes.of(model)
    for block in model.model.layers:
        block.mlp.up_proj = Packed(64, 160)
    packed = Sizes.of(model)
    assert packed.matmul_weights == plain.matmul_weights
    assert packed.trained_weights == plain.trained_weights - 6 * 64 * 160


def test_experts_are_not_guessed():
    assert sizes_of(model_of("mixtral", FAMILIES["mixtral"])) is None
    assert speed_figures(None, [row()], 0, 1.0, 1.0) == {}


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_by_the_devices_name(name, bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_tflops(torch.device("cuda", 0), "bf16")
    assert found == bf16
    assert peak_tflops(torch.device("cpu"), "bf16") is None
    if bf16 is not None:
        assert peak_tflops(torch.device("cuda", 0), "fp32") < bf16


def test_runs_log_what_they_reach(tmp_path, monkeypatch):
    """A live reference is work too: the same step at the same clock."""
    monkeypatch.setattr(loop, "peak_tflops", lambda device, precision: 4.0)
    words = ("stage=dpo", "train.max_steps=1", "train.sample_prompts=0", "data.eval_rows=0")
    rates = {}
    for kind in ("cached", "live"):
        train(tmp_path / kind, *words, f"stage.reference_logprobs={kind}")
        (found,) = [r for r in metrics(tmp_path / kind) if "tflops_per_second" in r]
        assert found["mfu"] == pytest.approx(found["tflops_per_second"] / 4.0)
        rates[kind] = found["tflops_per_second"] * found["step_seconds"]
    assert 1.2 < rates["live"] / rates["cached"] < 1.4  # 4 / 3


def test_without_a_known_peak_no_utilisation_is_claimed(tmp_path):
    train(tmp_path / "r", "stage=reward", "train.max_steps=1", "data.eval_rows=0")
    (found,) = [r for r in metrics(tmp_path / "r") if "loss" in r]
    assert found["tflops_per_second"] > 0
    assert "mfu" not in found
