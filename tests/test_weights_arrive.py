"""Weights as they are stored: read once, exact, cheap to probe, and known by their files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.config import LoraConfig, ModelConfig
from dpo_cli.errors import NonFiniteError
from dpo_cli.model import digest
from dpo_cli.model import skeleton as skeleton_module
from dpo_cli.model.adapters import lora, quantize
from dpo_cli.model.adapters.active import Adaptation, adapted_layers, adapter_as
from dpo_cli.model.attention.interface import Placement, kernel_of
from dpo_cli.model.attention.probe import choose_attention
from dpo_cli.model.digest import loaded_digest, model_digest
from dpo_cli.model.load import load_model, load_tokenizer
from dpo_cli.model.skeleton import TOKENS, skeleton
from dpo_cli.model.stored import convert_weights, stored_dtype, weight_files
from dpo_cli.session import models
from small_adapters import write_base
from small_models import FAMILIES, SMALL
from small_runs import train

CPU, HALF = torch.device("cpu"), Placement(dtype=torch.bfloat16)
LORA = LoraConfig(name="lora", r=4)
QLORA = LoraConfig(name="qlora", r=4, quantization="nf4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small model stored in float32, and the same in bfloat16."""
    full = write_base(tmp_path_factory.mktemp("stored") / "float32", "llama")
    half = shutil.copytree(full, full.parent / "bfloat16")
    rewrite(half, lambda name, value: value.to(torch.bfloat16))
    return {torch.float32: full, torch.bfloat16: half}


def rewrite(folder, change):
    path = folder / "model.safetensors"
    state = {name: change(name, value) for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})


def loaded(folder, settings=None, on=None):
    config = ModelConfig(path=str(folder))
    adaptation = None if settings is None else Adaptation(settings)
    return load_model(config, load_tokenizer(config), 0, on=on, adaptation=adaptation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_model_is_float32_and_exactly_what_is_stored(folders, dtype):
    found = weight_files(str(folders[dtype]), {})
    assert stored_dtype(found) == dtype
    model = loaded(folders[dtype], on=HALF)
    plain = AutoModelForCausalLM.from_pretrained(folders[dtype], dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    theirs = plain.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items())
    assert model.config.dtype == torch.float32


def test_a_mixture_is_read_as_float32(folders, tmp_path):
    folder = shutil.copytree(folders[torch.float32], tmp_path / "mixed")
    rewrite(folder, lambda name, v: v if "norm" in name else v.to(torch.bfloat16))
    assert stored_dtype(weight_files(str(folder), {})) == torch.float32
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(loaded(folder).model.norm.weight, norm)


@pytest.mark.parametrize("family", ["gptj", "gemma2", "gemma3_text", "gpt_neox", "phi3", "gpt2"])
def test_what_is_worked_out_is_that_of_a_float32_model(tmp_path, family):
    """Rotary tables and scales: built in half precision they would be rounded for good."""
    from dpo_cli.model.read import read_pretrained

    config = AutoConfig.for_model(family, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model, _ = read_pretrained(AutoModelForCausalLM, ModelConfig(path=str(tmp_path)), "model.path")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, theirs = dict(model.named_buffers()), dict(plain.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_of_an_adapter_is_in_what_it_computes_in(folders, dtype):
    model = loaded(folders[dtype], LORA, HALF)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    stored = load_file(folders[dtype] / "model.safetensors")
    for name, value in frozen.items():
        assert torch.equal(value, stored[name.replace("base_layer.", "")].to(torch.bfloat16)), name
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    exact = loaded(folders[dtype], LORA, Placement())
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, value in exact.named_parameters():  # drawn alike, and not rounded to the base
        assert not value.requires_grad or torch.equal(value, ours[name]), name


def outcome(model):
    """The last hidden states and every gradient, under autocast."""
    kind = model.device.type
    ids = torch.arange(40, device=kind)[None] * 7
    model.zero_grad()
    with torch.autocast(kind, torch.bfloat16):
        out = model.base_model(ids).last_hidden_state
    weights = torch.linspace(-1, 1, out.numel(), device=kind).view(out.shape)
    (out.float() * weights).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(grads) > 10
    return [out.detach(), *grads]


def stirred(model):
    """With an adapter that does something."""
    torch.manual_seed(0)
    for layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("settings", [LORA, QLORA], ids=lambda s: s.name)
def test_without_pefts_casts_it_is_the_same_to_the_bit(folders, settings):
    model = stirred(loaded(folders[torch.bfloat16], settings, HALF))
    patched = [x for x in adapted_layers(model) if "_cast_input_dtype" in vars(x)]
    assert len(patched) == 14
    seen = []
    for layer in patched:
        layer.lora_A["default"].register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    ours = outcome(model)
    assert torch.bfloat16 in seen
    for layer in patched:
        del layer._cast_input_dtype
    seen.clear()
    theirs = outcome(model)
    assert set(seen) == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_without_autocast_the_input_is_cast_still(folders):
    model = stirred(loaded(folders[torch.bfloat16], LORA, HALF)).eval()
    with torch.no_grad():
        assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_dora_keeps_its_norms_in_float32(folders):
    model = loaded(folders[torch.bfloat16], LoraConfig(name="dora", r=4, use_dora=True), HALF)
    layer = model.model.layers[0].mlp.up_proj
    norms = layer.get_base_layer().weight.float().norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, norms)
    stirred(model)
    ours = outcome(model)
    for x in adapted_layers(model):
        vars(x).pop("_cast_input_dtype")
    assert all(torch.equal(a, b) for a, b in zip(ours, outcome(model), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_dequantised_to_what_they_are_multiplied_in(folders, dtype):
    pytest.importorskip("bitsandbytes")
    model = stirred(loaded(folders[dtype], QLORA, HALF))
    states = [x.weight.quant_state for x in quantize.quantized_layers(model)]
    assert {state.dtype for state in states} == {torch.bfloat16}
    assert len(states) == 14
    ours = outcome(model)
    quantize.dequantize_to(model, torch.float32)
    theirs = outcome(model)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_four_bits_are_the_same_whatever_they_were_stored_in(folders):
    pytest.importorskip("bitsandbytes")
    one, other = (
        {n: p for n, p in loaded(folder, QLORA, HALF).named_parameters() if p.dtype == torch.uint8}
        for folder in (folders[torch.bfloat16], widened(folders[torch.bfloat16]))
    )
    assert len(one) == 14
    assert all(torch.equal(p, other[n]) for n, p in one.items())


def widened(folder):
    target = shutil.copytree(folder, folder.parent / "widened")
    rewrite(target, lambda name, value: value.float())
    return target


# ---------------------------------------------------------------- the probe's copy


def deep(family="llama", layers=6, **changes):
    torch.manual_seed(0)
    shape = {**FAMILIES[family], "num_hidden_layers": layers, **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).eval()


def test_a_probe_copies_one_layer_of_a_kind_and_few_tokens():
    model = deep(vocab_size=640).to(torch.bfloat16)
    few = skeleton(model, CPU)
    assert len(few.model.layers) == few.config.num_hidden_layers == 2
    assert few.config.vocab_size == few.get_input_embeddings().weight.shape[0] == TOKENS
    assert {p.dtype for p in few.parameters()} == {torch.float32}
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert sum(p.numel() for p in few.parameters()) == layer + 2 * TOKENS * 32 + 32
    first = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(few.model.layers[0].mlp.up_proj.weight, first.float())
    assert model.config.num_hidden_layers == len(model.model.layers) == 6
    assert model.config.vocab_size == 640
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_no_weight_is_copied_twice_nor_one_that_is_cut_whole(monkeypatch):
    """On its way, too: 128,256 tokens in float32 are 2 GiB."""
    model, copied = deep(vocab_size=640).to(torch.bfloat16), []
    real = skeleton_module._as_float32

    def counted(weight, device):
        made = real(weight, device)
        copied.append(made.numel())
        return made

    monkeypatch.setattr(skeleton_module, "_as_float32", counted)
    few = skeleton(model, CPU)
    assert sum(copied) == sum(p.numel() for p in few.parameters())


def test_a_copy_in_float32_holds_no_weight_twice():
    model = deep()
    own = {id(p) for p in model.parameters()}
    ends = {id(p) for p in skeleton(model, CPU).parameters()} - own
    assert len(ends) == 2  # rows of the embedding and of the output layer


def test_every_kind_of_layer_is_tried():
    kinds = ["sliding_attention"] * 5 + ["full_attention"] * 2 + ["sliding_attention"]
    model = deep("gemma3_text", 8, layer_types=kinds)
    few = skeleton(model, CPU)
    assert few.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert few(ids, use_cache=False).logits.shape == (1, 20, TOKENS)


def test_whole_is_the_model_itself():
    """Where a forward cannot do without a layer."""
    model = deep(layers=3)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(skeleton(model, CPU, complete=True)(ids).logits, model(ids).logits)


def test_a_family_that_needs_all_its_layers_is_tried_whole(monkeypatch):
    model = deep()
    real = type(model.model).forward

    def needs(self, *args, **kwargs):
        return real(self, *args, **kwargs) if len(self.layers) == 6 else self.layers[5]

    monkeypatch.setattr(type(model.model), "forward", needs)
    choose_attention(model, "auto")
    assert kernel_of(model) == "grouped"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_no_number_is_found_in_any_layer(dtype, value):
    model = deep().to(dtype)
    with torch.no_grad():
        model.model.layers[3].self_attn.k_proj.weight[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"layers\.3\.self_attn\.k_proj\.weight is not finite"):
        choose_attention(model, "auto")


# ---------------------------------------------------------------- known by its files


def test_the_same_files_are_the_same_function(folders, tmp_path):
    folder = folders[torch.bfloat16]
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    first = loaded_digest(loaded(folder))
    assert loaded_digest(loaded(copy)) == first
    assert first != loaded_digest(loaded(folders[torch.float32]))


@pytest.mark.parametrize("change", range(5))
def test_every_byte_of_every_piece_counts(tmp_path, monkeypatch, change):
    monkeypatch.setattr(digest, "PIECE", 1000)
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    content = [bytes(range(256)) * 10, b"", b"x" * 1000]
    for file, data in zip(files, content, strict=True):
        file.write_bytes(data)
    first = digest.FileDigest(files).value()
    assert first == digest.FileDigest(files).value()
    place, at = [(0, 0), (0, 999), (0, 1000), (0, 2559), (2, 999)][change]
    data = bytearray(content[place])
    data[at] ^= 1
    files[place].write_bytes(data)
    assert digest.FileDigest(files).value() not in (first, None)
    assert digest.FileDigest([*files, tmp_path / "gone"]).value() is None


def test_one_changed_weight_is_another_function_though_name_size_and_time_are_the_same(
    folders, tmp_path
):
    folder = shutil.copytree(folders[torch.bfloat16], tmp_path / "model")
    file = folder / "model.safetensors"
    before, first = file.stat(), loaded_digest(loaded(folder))

    def change(name, value):
        if name == "model.norm.weight":
            value[0] += 1
        return value

    rewrite(folder, change)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert loaded_digest(loaded(folder)) != first


def test_what_it_is_held_in_and_its_configuration_count(folders):
    folder = folders[torch.bfloat16]
    model = loaded(folder)
    first = loaded_digest(model)
    convert_weights(model, torch.bfloat16)
    rounded = loaded_digest(model)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert len({first, rounded, loaded_digest(model)}) == 3


def test_an_adapter_counts_by_its_values_where_it_is_on(folders):
    folder = folders[torch.bfloat16]
    model = loaded(folder, LORA, Placement())
    with adapter_as(model, None):
        assert loaded_digest(model) == loaded_digest(loaded(folder))
    new = loaded_digest(model)
    stirred(model)
    assert len({new, loaded_digest(model), loaded_digest(loaded(folder))}) == 3


def test_files_that_change_while_they_are_read_are_not_believed(folders, tmp_path):
    folder = shutil.copytree(folders[torch.bfloat16], tmp_path / "model")
    model = loaded(folder)
    rewrite(folder, lambda name, value: value * 2)
    assert loaded_digest(model) == model_digest(model)


def test_a_merged_adapter_is_part_of_the_function(folders, tmp_path):
    model = stirred(loaded(folders[torch.bfloat16], LORA))
    digests = []
    for _ in range(2):
        target = tmp_path / str(len(digests))
        target.mkdir()
        lora.save_adapter(model, target)
        for file in folders[torch.bfloat16].glob("tokenizer*"):
            shutil.copy(file, target)
        digests.append(loaded_digest(loaded(target)))
        with torch.no_grad():
            adapted_layers(model)[0].lora_B["default"].weight.mul_(2.0)
    assert len({*digests, loaded_digest(loaded(folders[torch.bfloat16]))}) == 3


def test_a_run_reads_files_alone_and_once(folders, tmp_path, monkeypatch):
    """No value of the model is hashed, whichever rows its log-probabilities are of."""
    asked, real = [], digest.FileDigest.__init__
    monkeypatch.setattr(digest, "model_digest", None)
    monkeypatch.setattr(digest, "_known", {})

    def counted(self, files):
        asked.append(files)
        real(self, files)

    monkeypatch.setattr(digest.FileDigest, "__init__", counted)
    words = ("stage=dpo", f"model.path={folders[torch.bfloat16]}")
    train(tmp_path / "run", *words, "train.max_steps=1", f"cache_dir={tmp_path / 'cache'}")
    assert len(asked) == 1
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2  # of both splits


def test_ranks_look_at_weights_as_they_come():
    bad = torch.nn.Parameter(torch.tensor([1.0, torch.nan], dtype=torch.bfloat16))
    good = torch.nn.Parameter(torch.tensor([1.5, 2.0], dtype=torch.bfloat16))
    models._arrived("Llama", torch.float32, [("norm", good)])
    assert good.dtype == torch.float32
    with pytest.raises(NonFiniteError, match=r"^Llama: its weight head is not finite"):
        models._arrived("Llama", torch.float32, [("norm", good), ("head", bad)])


# ---------------------------------------------------------------- memory of the host

MEASURE = """
import re, sys, torch
from functools import partial
import torch.distributed as dist
from dpo_cli.config import LoraConfig, ModelConfig
from dpo_cli.model import load
from dpo_cli.model.adapters import lora
from dpo_cli.model.adapters.active import Adaptation
from dpo_cli.model.attention.interface import Placement
from dpo_cli.distributed.fsdp import make_mesh, shard
from dpo_cli.session.models import _arrived
from dpo_cli.train.runtime import quiet_libraries

quiet_libraries()
folder, kind, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3])
if ranks > 1:
    dist.init_process_group("gloo")
    mesh = make_mesh("cpu", ranks, 1, "full")
source = ModelConfig(path=folder)
tokenizer = load.load_tokenizer(source)
how = None if kind == "full" else Adaptation(LoraConfig(name="lora"))
read = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = read("VmRSS")
on = Placement(dtype=torch.bfloat16, sharded=ranks > 1)
model = load.load_model(source, tokenizer, on=on, adaptation=how)
if ranks > 1:
    held = torch.float32 if how is None else None
    shard(model, mesh, torch.bfloat16, partial(_arrived, "Llama", held))
peak = torch.tensor([read("VmHWM") - before])
if ranks > 1:
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    dist.barrier()
if ranks == 1 or dist.get_rank() == 0:
    print("peak", int(peak) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a peak")
@pytest.mark.parametrize(
    ("kind", "ranks", "most"),
    [
        pytest.param("lora", 1, 1.7, marks=pytest.mark.slow),
        pytest.param("full", 1, 3.3, marks=pytest.mark.slow),
        pytest.param("full", 2, 3.0, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_of_the_host_in_sizes_of_the_file(tmp_path, kind, ranks, most):
    """Its mapped pages are one, float32 masters two, half of them on two ranks; what is copied for
    the probe is less than half, and so is a block on its way. A float32 copy on the way to an
    adapter's base would add two, one of each rank one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    write_base(tmp_path, "llama")
    shape = {**SMALL, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
             "vocab_size": 1024, "num_attention_heads": 16}  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    # Of equal weights every gradient is rounding, which the probe would compare.
    state = {
        n: (torch.randn(p.shape) * 0.02 + (p.ndim == 1)).to(torch.bfloat16)
        for n, p in model.state_dict().items()
    }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 150e6
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words = [sys.executable, *(launcher if ranks > 1 else []), str(script)]
    told = [str(tmp_path), kind, str(ranks)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*words, *told], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak")[-1]) / size
    assert peak < most
    print(f"{kind} on {ranks}: {peak:.2f} sizes of the file")
