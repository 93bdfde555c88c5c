"""Weights that are missing, damaged, pickled, foreign or out of reach: one line each."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from dpo_cli.errors import ConfigError
from dpo_cli.model.load import load_model, load_tokenizer
from dpo_cli.model.sampling.generate import SamplingOptions, sample
from small_runs import configure, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "run"
    train(folder, "stage=sft", "train.max_steps=1")
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained / "final", tmp_path / "model")


def load(path, *words):
    config = configure("model=custom", f"model.path={path}", *words).model
    return load_model(config, load_tokenizer(config))


def test_a_run_folder_means_its_final_model(trained):
    assert load(trained).config.n_layer == 2


def test_missing_weights_are_not_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    kept = {k: v for k, v in weights.items() if ".h.1." not in k}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"\d+ weights of GPT2LMHeadModel are missing.*h\.1\."):
        load(copy)


def test_a_truncated_file_is_one_line(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(ConfigError, match=r"^model\.path=.*: cannot be loaded: .*$"):
        load(copy)


def test_a_config_of_another_shape_is_one_line(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "n_embd": 64}))
    with pytest.raises(ConfigError, match=r"^model\.path=[^\n]*$"):
        load(copy)


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights"):
        load(copy)


def test_a_tokenizer_too_large_for_the_embedding(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    assert config["vocab_size"] == 1024
    for i in range(5):
        tokenizer["added_tokens"].append({
            "id": 1024 + i, "content": f"<extra{i}>", "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        })  # fmt: skip
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="1029 tokens but the model's embedding has 1024 rows"):
        load(copy)


def test_an_unreachable_hub_names_the_key_to_set():
    config = configure("model=gpt2-large").model
    with pytest.raises(ConfigError, match=r"gpt2-large cannot be loaded from .*model\.path="):
        load_tokenizer(config)


def test_an_empty_folder_names_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("key", "value"),
    [("output_attentions", True), ("output_hidden_states", True), ("return_dict", False)],
)
def test_flags_that_ask_for_more_outputs_change_nothing(trained, copy, tmp_path, key, value):
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {key: value}))
    models, ids = (load(copy), load(trained)), torch.arange(6)[None]
    for model in models:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        one, other = (model(ids).logits for model in models)
    assert torch.equal(one, other)
    run = tmp_path / "run"
    train(run, "stage=dpo", "train.max_steps=1", f"model.path={copy}")
    assert load(run).config.n_layer == 2


def test_router_logits_are_not_asked_for(trained, tmp_path):
    tokenizer = load_tokenizer(configure("model=custom", f"model.path={trained}").model)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    config = MixtralConfig(vocab_size=len(tokenizer), output_router_logits=True, **shape)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["output_router_logits"]
    model = load(tmp_path / "moe")
    prompts = [np.array([3, 4, 5], np.int32), np.array([6, 7], np.int32)]
    options = SamplingOptions(temperature=0.0, max_new_tokens=4)
    rows = sample(model, prompts, options, 0, 1)
    model.set_attn_implementation("eager")
    for prompt, (row,) in zip(prompts, rows, strict=True):
        ids = prompt.tolist()
        while len(ids) < len(prompt) + 4 and (ids[-1] != 0 or len(ids) == len(prompt)):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert row.ids.tolist() == ids[len(prompt) :]
