"""Hostile and absurd files in a model's folder: refused in one line, before anything is built."""

import json
import os
import shutil
import time
from contextlib import suppress

import pytest
import torch
import transformers
from safetensors.torch import save_file

from dpo_cli.config import LoraConfig, ModelConfig
from dpo_cli.durable.provenance import load_provenance
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.model.adapters import patterns
from dpo_cli.model.adapters.active import Adaptation
from dpo_cli.model.load import count_parameters, hf_config, load_model, load_tokenizer
from dpo_cli.model.source import loading
from dpo_cli.model.vetting import vet_adapter
from small_adapters import write_base
from test_adapter_kinds import low_rank, written

DEEP = "[" * 100_000 + "]" * 100_000
CONFIGS = {  # changes of config.json, and what the line says
    "negative": ({"hidden_size": -4}, "hidden_size=-4: must be from 0"),
    "zero heads": ({"num_attention_heads": 0}, "cannot be loaded: .*ZeroDivision|num_attention"),
    "zero width": ({"hidden_size": 0}, "cannot be loaded"),
    "text": ({"hidden_size": "big"}, "'hidden_size' expected int, got str"),
    "no context": ({"max_position_embeddings": None}, "max_position_embeddings"),
    "layers": ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000: must be from 0 to 1,000"),
    "endless layers": ({"num_hidden_layers": 10**18}, "must be from 0 to 1,000"),
    "labels": ({"num_labels": 10**9}, "num_labels=1000000000: must be from 0"),
    "vocabulary": ({"vocab_size": 2**40}, "vocab_size=.*: must be from 0"),
    "wide": ({"intermediate_size": 2**26}, "numbers"),
    "nested": ({"rope_parameters": {"a": {"num_layers": -1}}}, "rope_parameters.a.num_layers=-1"),
    "quantized": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quantization_config=.*: its weights are quantized: use .* lora=qlora",
    ),
    "flash attention": ({"attn_implementation": "flash_attention_2"}, "names code from elsewhere"),
    "a kernel of the hub": ({"attn_implementation": "kernels-community/flash-attn"}, "elsewhere"),
    "by layer": ({"attn_implementation": {"": "sdpa", "text_config": "a/b"}}, "elsewhere"),
    "by its other name": ({"_attn_implementation": "a/b:c"}, "elsewhere"),
    "experts": ({"experts_implementation": "sonicmoe"}, "elsewhere"),
    "fusion": ({"fusion_config": {"a": 1}}, "fusion_config"),
    "weights": ({"transformers_weights": "adapter_model.bin"}, "must be model.safetensors"),
    "another file": ({"configuration_files": ["config.4.0.0.json"]}, "must be config.json"),
    "activation": ({"hidden_act": "os.system"}, "cannot be loaded"),
    "family": ({"model_type": "evil"}, "cannot be loaded: .*evil"),
    "dtype": ({"dtype": "load"}, "cannot be loaded"),
}
WHOLE = {"list": "[1]", "text": '"x"', "nothing": "", "deep": DEEP, "digits": "1" * 10_000}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("vetting") / "base", "llama")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return written(low_rank(), base, tmp_path_factory.mktemp("vetting") / "adapter")


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "model")


def change(folder, name, changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder):
    config = ModelConfig(path=str(folder))
    return load_model(config, load_tokenizer(config))


def plan(folder):
    """What a dry run does."""
    config = ModelConfig(path=str(folder))
    return count_parameters(config, load_tokenizer(config))


def refused(act, folder, says=""):
    """The one line that `act` is refused with, within seconds."""
    began = time.process_time()
    with pytest.raises(ConfigError, match=rf"^model\.path=.*{says}") as found:
        act(folder)
    line = str(found.value)
    assert "\n" not in line
    assert len(line) < 700
    assert time.process_time() - began < 6
    return line


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_chooses_code_or_has_absurd_sizes_is_refused(copy, name):
    changes, says = CONFIGS[name]
    change(copy, "config.json", changes)
    refused(load, copy, f"(?:{says})")


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"wide", "zero width", "weights"}))
def test_a_plan_refuses_the_same(copy, name):
    change(copy, "config.json", CONFIGS[name][0])
    refused(plan, copy)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_file_that_is_no_object_is_refused(copy, file, name):
    (copy / file).write_text(WHOLE[name])
    refused(load, copy)


def test_attention_that_transformers_ships_is_allowed_but_not_obeyed(copy, base):
    """model.attention chooses, whatever the folder says."""
    change(copy, "config.json", {"attn_implementation": "sdpa", "quantization_config": None})
    one, other = load(copy), load(base)
    assert one.config._attn_implementation == other.config._attn_implementation


def test_the_bounds_leave_room_for_every_model_of_conf(copy):
    """Of the largest public ones: layers, experts, widths, vocabulary, positions."""
    change(copy, "config.json", {
        "num_hidden_layers": 2, "max_position_embeddings": 10_485_760, "layer_norm_eps": 1e-6,
        "pad_token_id": -1, "sliding_window_size": -1, "moe_layer_end_index": -1,
        "n_routed_experts": 384, "moe_intermediate_size": 2048, "rope_theta": 5_000_000,
    })  # fmt: skip
    found = hf_config(ModelConfig(path=str(copy)), load_tokenizer(ModelConfig(path=str(copy))))
    assert found.max_position_embeddings == 10_485_760


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chat_template": 5}, "chat_template=5: expected text"),
        ({"chat_template": {"default": [1]}}, ""),
        ({"model_max_length": "long"}, "model_max_length"),
        ({"eos_token": {"a": 1}}, ""),
        ({"eos_token": ["</s>"]}, ""),
        ({"added_tokens_decoder": {"x": 1}}, ""),
        ({"added_tokens_decoder": [1]}, ""),
        ({"extra_special_tokens": 7}, ""),
        ({"tokenizer_class": 7}, ""),
    ],
)
def test_a_tokenizer_with_absurd_values_is_refused_or_read(copy, changes, says):
    """Some of them transformers ignores: then the tokenizer is as good as without."""
    change(copy, "tokenizer_config.json", changes)
    if says:
        refused(load, copy, f".*{says}")
        return
    with suppress(ConfigError):
        tokens = load_tokenizer(ModelConfig(path=str(copy)))("the film").input_ids
        assert tokens
        assert all(isinstance(token, int) for token in tokens)


def sharded(folder, names):
    """The folder's weights behind an index with these names of files."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    table = {f"layer.{i}": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": table})
    )


@pytest.mark.parametrize("name", [
    "pytorch_model.bin", "../base/part.safetensors", "/etc/passwd", "sub/../../x.safetensors",
    "link.safetensors", "folder/model.safetensors", "circle.safetensors", "x.pt", "", 7, None,
])  # fmt: skip
def test_an_index_names_safetensors_of_its_folder_alone(copy, base, name):
    sharded(copy, ["part.safetensors", name])
    shutil.copytree(base, copy.parent / "base")
    (copy / "link.safetensors").symlink_to(copy.parent / "base" / "model.safetensors")
    (copy / "folder").symlink_to(copy.parent / "base")
    (copy / "circle.safetensors").symlink_to("circle.safetensors")
    refused(load, copy, "model.safetensors.index.json: ")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', DEEP])
def test_a_broken_index_is_refused(copy, text):
    sharded(copy, [])
    (copy / "model.safetensors.index.json").write_text(text)
    refused(load, copy, "model.safetensors.index.json")


def test_links_within_the_folder_and_into_the_hubs_cache_are_followed(copy, base, tmp_path):
    weights = copy / "model.safetensors"
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    shutil.copytree(copy, snapshot)
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "part.safetensors").symlink_to("../../blobs/123")
    weights.rename(copy / "real.safetensors")
    (copy / "part.safetensors").symlink_to("real.safetensors")
    names = list(load(base).state_dict())
    for folder in (copy, snapshot):
        table = dict.fromkeys(names, "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": table})
        )
        assert torch.equal(load(folder).lm_head.weight, load(base).lm_head.weight)


LOOP = "(.*)*(.*)*(.*)*(.*)*(.*)*z"
ADAPTERS = {
    "expression": ({"target_modules": LOOP}, "target_modules=.* seconds to match"),
    "of excluded": ({"exclude_modules": LOOP}, "exclude_modules=.* seconds"),
    "of ranks": ({"rank_pattern": {LOOP: 2}}, "rank_pattern=.* seconds"),
    "of alphas": ({"alpha_pattern": {LOOP: 2}}, "alpha_pattern=.* seconds"),
    "of layers": ({"layers_pattern": [LOOP], "layers_to_transform": [0]}, "layers_pattern=.* sec"),
    "of saved": ({"modules_to_save": [LOOP]}, "modules_to_save=.* seconds"),
    "no expression": ({"target_modules": "(("}, "is no regular expression"),
    "numbers": ({"target_modules": [1, 2]}, "target_modules=.*: expected names"),
    "saved number": ({"modules_to_save": 5}, "modules_to_save=5: expected a list of names"),
    "arrow": ({"arrow_config": {"a": 1}}, ""),
    "tokens": ({"trainable_token_indices": [0, 10**9]}, "1000000000: the model has tokens 0 to 10"),
    "rank": ({"r": 10**9}, "r=1000000000: its weights have at most"),
    "rank of one": ({"rank_pattern": {"q_proj": 10**9}}, "its weights have at most"),
    "negative": ({"r": -1}, ""),
    "text": ({"r": "8"}, ""),
    "library": ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "names a library"),
    "repeats": ({"layer_replication": [[0, 10**6]]}, "repeats layers"),
    "alpha": ({"lora_alpha": "x"}, ""),
    "dropout": ({"lora_dropout": 5}, "expected from 0 to 1"),
    "kind": ({"peft_type": "EVIL"}, ""),
    "task": ({"task_type": [1]}, "task_type=.*: expected text"),
    "base": ({"base_model_name_or_path": ["a"]}, "expected the folder"),
    "long base": ({"base_model_name_or_path": "a" * 300}, ""),
    "start": ({"init_lora_weights": [1]}, "expected true, false"),
    "huge": ({"layers_to_transform": 10**30}, "is no plausible number"),
    "unknown": ({"loftq_config": 7}, None),
}


@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_with_absurd_or_hostile_values_is_refused(
    adapter, tmp_path, monkeypatch, name, further
):
    """Merged, and trained further."""
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    changes, says = ADAPTERS[name]
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change(folder, "adapter_config.json", changes)
    config = ModelConfig(path=str(folder))
    adaptation = Adaptation(LoraConfig(name="lora", r=4, alpha=8)) if further else None

    def act(folder):
        return load_model(config, load_tokenizer(config), adaptation=adaptation)

    if says is None:
        act(folder)
    else:
        refused(act, folder, f".*{says}")


def test_an_ordinary_expression_is_quick(adapter, tmp_path):
    """Such as other tools write."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change(folder, "adapter_config.json", {
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj|v_proj)))",
    })  # fmt: skip
    assert load(folder)


def test_an_adapter_beside_a_whole_model_is_refused(copy, adapter):
    for path in adapter.glob("adapter*"):
        shutil.copy(path, copy)
    change(copy, "adapter_config.json", {"target_modules": LOOP})
    refused(load, copy, "contains both an adapter and a model")


def test_a_model_larger_than_its_files_is_not_made(copy):
    """A width that no weight in the files has."""
    change(copy, "config.json", {"intermediate_size": 2**22, "num_hidden_layers": 900})
    refused(load, copy, "numbers")


def test_files_that_are_none_are_refused(copy):
    (copy / "model.safetensors").unlink()
    os.mkfifo(copy / "model.safetensors")
    refused(load, copy)


def test_weights_that_only_look_like_safetensors(copy):
    (copy / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(load, copy)
    save_file({}, copy / "model.safetensors")
    refused(load, copy)


@pytest.mark.parametrize("text", [
    "[1]", "nothing", DEEP, '{"date": 5}', '{"date": "today"}', '{"reference": ["a"]}', "\xff",
])  # fmt: skip
def test_how_it_was_trained_is_read_or_refused(copy, text):
    assert load_provenance(copy) == {}
    (copy / "dpo_run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"dpo_run\.json: .*restore or remove (it|the file)$"):
        load_provenance(copy)


@pytest.mark.parametrize(
    ("file", "says"),
    [("config.json", "names code from elsewhere"), ("adapter_config.json", "both an adapter and")],
)
def test_a_repository_of_the_hub_is_vetted_as_well(copy, monkeypatch, file, says):
    (copy / file).write_text(json.dumps({"attn_implementation": "a/b"}))
    asked = []

    def cached_file(source, name, revision, **_):
        asked.append((source, name, revision))
        return str(copy / name) if (copy / name).is_file() else None

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    with pytest.raises(ConfigError, match=says), loading("a/b", "model.hub_id", {"revision": "1"}):
        raise AssertionError("read before it was vetted")
    assert ("a/b", file, "1") in asked


def test_a_key_with_a_line_break_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        vet_adapter({"a\nb": "x" * 5000}, 8, "model.path=m")
    assert "\n" not in str(caught.value)
