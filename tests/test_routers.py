"""The load-balancing loss of mixtures of experts: transformers' own, of every sequence alone."""

import importlib
import json
import math

import pytest
import torch

import small_tokenizers
from dpo_cli.errors import ConfigError
from dpo_cli.model.attention import interface
from dpo_cli.model.rope import cuts_of
from dpo_cli.model.routers import Routers, _kinds, loss_function
from dpo_cli.plan.dry_run import plan_rows
from families import TRAINED, build_random
from small_models import examples, gradients, packed, packed_loss, sequences
from small_runs import configure, metrics
from small_runs import run as run_stage
from test_rope import FAMILIES as LONGROPE

KERNELS = {"gpt_oss": "plain", "jamba": "plain", "mixtral": "grouped", "olmoe": "dense"}
FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "phimoe",
    "gpt_oss",
    "jamba",
)


def alone(model, rows):
    """transformers' function of the logits of one forward a sequence."""
    model.set_attn_implementation("eager")
    found = [
        model(input_ids=torch.cat(pair)[None], output_router_logits=True, use_cache=False)
        for pair in sequences(rows)
    ]
    layers = [torch.cat(parts) for parts in zip(*(out.router_logits for out in found), strict=True)]
    module = importlib.import_module(type(model).__module__)
    experts, chosen = layers[0].shape[1], model.config.num_experts_per_tok
    return module.load_balancing_loss_func(tuple(layers), experts, chosen)


def watched(model, rows, kernel):
    if not _kinds(type(model)):
        pytest.skip("this transformers does not record its routers")
    routers = Routers(model, 0.1)
    interface.use_kernel(model, kernel)
    batch = packed(rows, keep_last=True, cuts=cuts_of(model.config))
    with routers.watched():
        packed_loss(model, batch)
    return routers.loss(batch)


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_that_of_plain_forwards(family, branches):
    model, rows = build_random(family), examples(branches)
    got = watched(model, rows, KERNELS.get(family, "sdpa"))
    found = gradients(model, got)
    expected = alone(model, rows)
    assert float(got) == pytest.approx(float(expected), abs=1e-5)
    for name, grad in gradients(model, expected).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_it_is_that_of_a_padded_batch(family):
    model, rows = build_random(family), examples(2)
    got = watched(model, rows, "sdpa")
    texts = [torch.cat(pair) for pair in sequences(rows)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    model.set_attn_implementation("eager")
    out = model(input_ids=padded, attention_mask=mask, output_router_logits=True, use_cache=False)
    assert float(got) == pytest.approx(float(out.aux_loss), abs=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "plain"])
def test_rows_that_are_cut_by_length(kernel):
    model = build_random("phimoe", LONGROPE["phimoe"])
    rows = examples(3)
    got = watched(model, rows, kernel)
    assert float(got) == pytest.approx(float(alone(model, rows)), abs=1e-5)


def test_forwards_without_gradients_do_not_count():
    """Such as the reference's, which may be the policy without its adapter."""
    model, rows = build_random("mixtral"), examples(1)
    routers, batch = Routers(model, 0.1), packed(rows, keep_last=True)
    with routers.watched(), torch.no_grad():
        packed_loss(model, batch)
    assert routers.loss(batch) is None
    with routers.watched():
        packed_loss(model, batch)
        with torch.no_grad():
            packed_loss(model, batch)
    assert [len(x) for x in routers.logits] == [len(batch.input_ids)] * 2


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_models_without_one_are_refused(family):
    line = r"^train\.router_aux_loss_coef=0\.1: transformers has no load-balancing loss for .*$"
    with pytest.raises(ConfigError, match=line):
        loss_function(type(build_random(family)), 0.1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    tokenizer = small_tokenizers.words()
    more = {"vocab_size": 102, "eos_token_id": 100, "pad_token_id": 100}
    for family in ("mixtral", "llama"):
        model = build_random(family, {**TRAINED[family], **more})
        model.save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    pairs = [
        {"prompt": f"w{n} w1", "chosen": f" w{n + 2} w3 w4", "rejected": f" w{n + 1}"}
        for n in range(4)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def words(files, family, stage, *more):
    return [
        f"stage={stage}", "model=custom", f"model.path={files}/{family}", "data=jsonl",
        f"data.path={files}/pairs.jsonl", "hardware=cpu", "logger=none", "train.batch_size=4",
        "train.router_aux_loss_coef=0.5", *more,
    ]  # fmt: skip


CASES = [("sft", "none"), ("dpo", "none"), ("dpo", "lora"), ("reward", "none")]


@pytest.mark.parametrize(("stage", "lora"), CASES)
def test_runs_add_it_to_their_loss(files, tmp_path, stage, lora):
    more = ["stage.normalize_prompts=0"] if stage == "reward" else ["train.sample_prompts=0"]
    more += ["lora=lora", "lora.target_modules=[q_proj]"] * (lora == "lora")
    config = configure(*words(files, "mixtral", stage, *more, f"run_dir={tmp_path}/run"))
    run_stage(config, ["dpo-run"])
    first = next(row for row in metrics(tmp_path / "run") if "router_aux_loss" in row)
    own = {"sft": first.get("nll_per_token"), "dpo": math.log(2)}.get(stage)
    assert first["router_aux_loss"] >= 1.9  # two experts a token: 2 where all are equal
    if own is not None:
        assert first["loss"] == pytest.approx(own + 0.5 * first["router_aux_loss"], abs=1e-4)


def test_a_run_of_another_model_is_refused_in_a_line(files, tmp_path):
    config = configure(*words(files, "llama", "sft", f"run_dir={tmp_path}/run"))
    line = r"^train\.router_aux_loss_coef=0\.5: transformers has no .* for LlamaForCausalLM.*$"
    for start in (lambda: plan_rows(config), lambda: run_stage(config, ["dpo-run"])):
        with pytest.raises(ConfigError, match=line):
            start()
