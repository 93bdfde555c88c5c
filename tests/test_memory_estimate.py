"""The memory plan: parts worked by hand, counts of real models, what autograd really keeps."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from dpo_cli.config import HardwareConfig, LoraConfig, OptimConfig
from dpo_cli.model import forward
from dpo_cli.model.adapters.casts import leave_casts_to_autocast
from dpo_cli.model.attention.interface import use_kernel
from dpo_cli.model.fuse import fuse_gelu
from dpo_cli.packing import pack
from dpo_cli.plan.memory.activations import Numbers, Rows, Trained, activation_bytes, block_bytes
from dpo_cli.plan.memory.shape import shape_of
from dpo_cli.plan.memory.weights import (
    Sharing,
    adapter_parameters,
    cast_bytes,
    frozen_bytes,
    gathered_bytes,
    state_bytes,
    trainable_of,
)
from dpo_cli.records import Batch, EncodedExample
from small_models import FAMILIES

GPT2 = shape_of(GPT2Config())
LLAMA = shape_of(LlamaConfig(  # Llama 3.1 8 B
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256,
))  # fmt: skip
FULL, ADAPTERS = LoraConfig(), LoraConfig(name="lora", r=8)
HARDWARE = HardwareConfig()


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_as_the_model_has_them(family: str) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.head == sum(p.numel() for p in model.get_output_embeddings().parameters())
    inside = sum(p.numel() for p in model.base_model.get_submodule(
        "h" if hasattr(model.base_model, "h") else "layers"
    ).parameters())  # fmt: skip
    assert shape.root_parameters == shape.parameters - inside


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "chosen", [{}, {"use_dora": True}, {"target_modules": ["down_proj", "c_fc", "fc_in", "dense"]}]
)
def test_adapters_are_counted_as_peft_makes_them(family: str, chosen: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    shape, lora = shape_of(config), LoraConfig(name="lora", r=8, **chosen)
    names = lora.target_modules
    if names == ["all-linear"]:
        names = [linear.name for linear in shape.linears]
    model.requires_grad_(False)
    peft = PeftConfig(
        r=8, target_modules=names, use_dora=lora.use_dora, fan_in_fan_out=family == "gpt2"
    )
    made = inject_adapter_in_model(peft, model)
    found = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert adapter_parameters(lora, shape) == found


def test_modules_that_are_saved_whole_are_trained_whole() -> None:
    lora = replace(ADAPTERS, modules_to_save=["c_proj"])
    # GPT-2: attention's (768, 768) and the MLP's (3072, 768), 12 times
    extra = 12 * (768 * 768 + 3072 * 768)
    assert adapter_parameters(lora, GPT2) == adapter_parameters(ADAPTERS, GPT2) + extra


# ---------------------------------------------------------------- worked by hand


def test_a_llama_block_of_adapters_by_hand() -> None:
    """In bf16, a token: two norms of 4096 kept in float32; the inputs of the seven adapters, in
    two bytes each, of which q, k and v share one, gate and up another: three of 4096 and one of
    14336; q of 4096, k and v of 1024 with 1.25 keys a
    token; the gate's input and output and the other side of 14336."""
    trained = Trained(False, LLAMA.linears)
    token = 2 * 4096 * 4 + 2 * (3 * 4096 + 14336) + 2 * (4096 + 1.25 * 2048) + 2 * 3 * 14336
    rows = Rows(tokens=1000, example=512, keys=1.25)
    found = block_bytes(LLAMA, Numbers(2, 2), trained, rows, "varlen")
    assert found == pytest.approx(1000 * token)
    # every second block again in the backward: 16 whole, 16 inputs, the one at work, and the ends
    kept = activation_bytes(LLAMA, Numbers(2, 2), trained, rows, "varlen", 2)
    ends = 1000 * 4096 * (4 + 2 * 2)
    assert kept == pytest.approx(17 * 1000 * token + 16 * 1000 * 4096 * 2 + ends)


def test_a_gpt2_block_by_hand() -> None:
    """In float32 on a CPU, a token: two norms of 768; inputs of 768, 768, 768 and 3072; q, k and
    v; the MLP of 3072 before its activation; 12 heads' probabilities of 100 keys."""
    values = 2 * 768 + (3 * 768 + 3072) + 3 * 768 + 3072 + 12 * 100
    found = block_bytes(GPT2, Numbers(4, 4), Trained(True), Rows(500, 100), "grouped")
    assert found == pytest.approx(4 * 500 * values)


def test_weights_and_state_by_hand() -> None:
    """GPT-2: 124,439,808 weights, of which 12 blocks have 7,077,888 in matrices."""
    full = trainable_of(FULL, HARDWARE, GPT2)
    assert (full.parameters, full.size, full.full) == (124_439_808, 4, True)
    for name, size in (("adamw", 8), ("rmsprop", 4), ("adamw8bit", 2 * (1 + 4 / 256))):
        assert state_bytes(OptimConfig(name=name), full) == pytest.approx(size * 124_439_808)
    half = trainable_of(FULL, HardwareConfig(weights="bf16"), GPT2)
    assert state_bytes(OptimConfig(), half) == 4 * 124_439_808
    assert cast_bytes(full, GPT2, True, Sharing()) == 2 * 12 * 7_077_888
    assert cast_bytes(full, GPT2, False, Sharing()) == 0
    for other in (half, trainable_of(ADAPTERS, HARDWARE, GPT2)):
        assert cast_bytes(other, GPT2, True, Sharing()) == 0


def test_quantised_weights_by_hand() -> None:
    """Llama 3.1: 218,103,808 weights a block in matrices, embeddings and head of 4096 x 128256."""
    matrices, rest = 32 * 218_103_808, 2 * 4096 * 128256 + (2 * 32 + 1) * 4096
    assert LLAMA.parameters == matrices + rest == 8_030_261_248
    nf4 = replace(ADAPTERS, quantization="nf4")
    # a scale byte for 64 weights, a float32 for 256 of the scales
    expected = matrices / 2 + matrices / 64 + 4 * matrices / (64 * 256) + 2 * rest
    assert frozen_bytes(nf4, LLAMA, half=True) == pytest.approx(expected)
    int8 = replace(ADAPTERS, quantization="int8")
    rows = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    assert frozen_bytes(int8, LLAMA, half=True) == matrices + 4 * rows + 2 * rest
    assert frozen_bytes(ADAPTERS, LLAMA, half=True) == 2 * LLAMA.parameters
    assert frozen_bytes(ADAPTERS, LLAMA, half=False) == 4 * LLAMA.parameters


def test_shards() -> None:
    assert Sharing.of(HardwareConfig(devices=8, nodes=2)).shards == 16
    assert Sharing.of(HardwareConfig(devices=8, nodes=2, sharding="hybrid")).shards == 8
    trainable = trainable_of(FULL, HARDWARE, LLAMA)
    block, root = 218_103_808 + 2 * 4096, 2 * 4096 * 128256 + 4096
    full = 2 * (2 * block + root) + 4 * (block + root)
    assert gathered_bytes(trainable, FULL, LLAMA, half=True) == full
    nf4 = replace(ADAPTERS, quantization="nf4")
    assert gathered_bytes(trainable_of(nf4, HARDWARE, LLAMA), nf4, LLAMA, half=True) == 0


# ---------------------------------------------------------------- what autograd keeps

WIDE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "head_dim": 32}
KEPT = {
    "gpt2": {"n_embd": 128, "n_layer": 4}, "gptj": {"n_embd": 128, "n_layer": 4, "rotary_dim": 8},
    "gpt_neox": WIDE, "llama": WIDE, "qwen3": WIDE, "mistral": WIDE, "gemma3_text": WIDE,
    "phi3": WIDE, "olmo2": WIDE, "cohere": WIDE,
}  # fmt: skip


def batch_of_pairs() -> Batch:
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, 96, n).astype(np.int32)  # noqa: E731
    return pack([EncodedExample(ids(30), (ids(17), ids(17)), i) for i in range(6)], range(6))


class Saved:
    """What autograd holds in place of a tensor, for as long as it needs it."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def saved_bytes(model: Any, batch: Batch, half: bool) -> int:
    """Of everything that the forward leaves for the backward, weights and their copies aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()}
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def keep(x: torch.Tensor) -> Saved:
        saved = Saved(x)
        alive.add(saved)
        return saved

    def is_weight(x: torch.Tensor) -> bool:
        transposed = x.t() if x.ndim == 2 else x
        copy = tuple(x.shape) in shapes or tuple(transposed.shape) in shapes
        return copy or x.untyped_storage().data_ptr() in weights

    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if half else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.x), autocast:
        states = forward.hidden_states(model, batch)
    stores = [saved.x.untyped_storage() for saved in alive if not is_weight(saved.x)]
    del states  # until here it holds the graph
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def built(family: str) -> tuple[Any, Any]:
    config = AutoConfig.for_model(
        family, **{**FAMILIES[family], **KEPT[family], "max_position_embeddings": 64}
    )
    model = AutoModelForCausalLM.from_config(config)
    fuse_gelu(model)
    return model, shape_of(config)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", KEPT)
def test_activations_are_those_that_autograd_keeps(family: str, half: bool) -> None:
    model, shape = built(family)
    batch = batch_of_pairs()
    kernel = "grouped" if shape.packed else "dense"
    use_kernel(model, kernel)
    rows = Rows(batch.input_ids.numel(), 62)
    numbers = Numbers(2 if half else 4, 4)
    found = activation_bytes(shape, numbers, Trained(True), rows, kernel, 0)
    assert found == pytest.approx(saved_bytes(model, batch, half), rel=0.12)


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize(
    ("family", "half"),  # a CPU's own layer norm keeps bf16 where CUDA's keeps float32
    [("gpt2", False), ("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)],
)
def test_activations_of_adapters_are_those_that_autograd_keeps(
    family: str, half: bool, dora: bool
) -> None:
    model, shape = built(family)
    batch = batch_of_pairs()
    use_kernel(model, "grouped")
    model.requires_grad_(False)
    names = [linear.name for linear in shape.linears]
    peft = PeftConfig(r=4, target_modules=names, fan_in_fan_out=family == "gpt2", use_dora=dora)
    model = inject_adapter_in_model(peft, model)
    for weight in model.parameters():
        if half and not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    leave_casts_to_autocast(model)
    size = 2 if half else 4
    rows = Rows(batch.input_ids.numel(), 62)
    found = activation_bytes(
        shape, Numbers(size, size), Trained(False, shape.linears, dora=dora), rows, "grouped", 0
    )
    tolerance = 0.08 if dora else 0.05
    assert found == pytest.approx(saved_bytes(model, batch, half), rel=tolerance)
