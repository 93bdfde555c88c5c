"""Weights straight to a GPU: those of a CPU, in the dtype they compute in."""

import pytest
import torch
from safetensors.torch import load_file

from dpo_cli.config import HardwareConfig, LoraConfig
from dpo_cli.model.adapters import quantize
from dpo_cli.model.adapters.active import adapted_layers
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.skeleton import skeleton
from dpo_cli.plan.memory.facts import room
from gpu_runs import DEVICE
from small_adapters import write_base
from test_weights_arrive import LORA, QLORA, deep, loaded, outcome, rewrite, stirred

pytestmark = pytest.mark.cuda
ON = Placement(torch.device(DEVICE), torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stored in bfloat16."""
    folder = write_base(tmp_path_factory.mktemp("stored") / "model", "llama")
    rewrite(folder, lambda name, value: value.to(torch.bfloat16))
    return folder


@pytest.mark.parametrize("settings", [None, LORA], ids=["full", "lora"])
def test_weights_come_to_the_device_exact_and_in_their_dtype(folder, settings):
    model = loaded(folder, settings, ON)
    stored = load_file(folder / "model.safetensors")
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {DEVICE}
    for name, value in model.named_parameters():
        if "lora_" in name:
            assert value.dtype == torch.float32
            continue
        assert value.dtype == (torch.float32 if settings is None else torch.bfloat16), name
        assert torch.equal(value.cpu(), stored[name.replace("base_layer.", "")].to(value.dtype))


@pytest.mark.parametrize("settings", [LORA, QLORA], ids=lambda s: s.name)
def test_an_adapter_starts_as_it_does_on_a_cpu(folder, settings):
    ours = dict(loaded(folder, settings, ON).named_parameters())
    for name, value in loaded(folder, LORA, Placement()).named_parameters():
        if "lora_" in name:
            assert torch.equal(ours[name].cpu(), value), name


@pytest.mark.parametrize("settings", [LORA, QLORA], ids=lambda s: s.name)
def test_casts_and_dtypes_that_are_left_out_change_no_bit(folder, settings):
    model = stirred(loaded(folder, settings, ON))
    ours = outcome(model)
    quantize.dequantize_to(model, torch.float32)
    for layer in adapted_layers(model):
        del layer._cast_input_dtype
    assert all(torch.equal(a, b) for a, b in zip(ours, outcome(model), strict=True))


def test_four_bits_compute_what_dense_weights_of_their_values_do(folder):
    model = stirred(loaded(folder, QLORA, ON))
    ours = outcome(model)
    with quantize.dequantized(model):
        dense = outcome(model)
    for one, other in zip(ours, dense, strict=True):
        error = (one.float() - other.float()).norm() / other.float().norm()
        assert error < 2e-2  # bf16's last digit is 4e-3


def test_dora_starts_with_the_norms_of_the_base_that_is_there(folder):
    model = loaded(folder, LoraConfig(name="dora", r=4, use_dora=True), ON)
    layer = model.model.layers[0].mlp.up_proj
    norms = layer.get_base_layer().weight.float().norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, norms)


def test_a_probe_of_a_model_on_the_host_runs_on_the_device():
    model = deep().to(torch.bfloat16)
    few = skeleton(model, torch.device(DEVICE))
    assert {p.device.type for p in [*few.parameters(), *few.buffers()]} == {DEVICE}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    ids = torch.arange(9, device=DEVICE)[None]
    with torch.no_grad():
        assert few(ids, use_cache=False).logits.isfinite().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="asks a GPU")
def test_room_is_what_is_free_and_what_is_held():
    device = torch.device(DEVICE, 0)
    total = torch.cuda.get_device_properties(device).total_memory
    before = room(HardwareConfig(), device)
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert abs(room(HardwareConfig(), device) - before) < 2**30  # others may work there, too
    assert held.numel() < before < total
    assert room(HardwareConfig(memory_gb=1.0), device) == 2**30
