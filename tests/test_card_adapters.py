"""Cards of adapters: their base, their reference, and a snippet that runs and computes the same."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard

from dpo_cli.model.adapters.quantize import match_eval_to_training
from dpo_cli.report.card import write_model_card
from small_adapters import plain_logprobs, rows, write_base
from small_runs import metrics, train

SMALL = ("lora.r=4", "optim.lr=1e-2", "train.eval_every_steps=0", "train.sample_prompts=0",
         "train.max_steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


def snippet(final, before):
    """The card's code up to `before`, run."""
    (code,) = re.findall(r"```python\n(.*?)```", (final / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code.partition(before)[0].replace("path/to/this/folder", str(final)), names)
    return code, names


@pytest.mark.parametrize("kind", ["lora", "qlora", "int8"])
def test_the_snippet_loads_the_policy_that_was_evaluated(base, tmp_path, kind):
    run, final = tmp_path / "r", tmp_path / "r" / "final"
    words = (f"lora={kind}", "data.responses=2", *SMALL)  # the rows of `rows`
    train(run, "stage=sft", f"model.path={base}", *words)
    code, names = snippet(final, "inputs =")
    assert ("BitsAndBytesConfig" in code) == (kind != "lora")
    match_eval_to_training(
        names["model"]
    )  # bitsandbytes cannot repack layers this narrow for a CPU
    found = plain_logprobs(names["model"], rows(base, tmp_path / "c"))[:, 0]
    tokens = sum(len(e.response_ids[0]) for e in rows(base, tmp_path / "c"))
    last = [row for row in metrics(run) if "eval/loss" in row][-1]
    # bits: the snippet multiplies in bfloat16, the run in float32
    near = {"lora": 1e-5}.get(kind, 5e-2)
    assert float(-found.sum()) / tokens == pytest.approx(last["eval/nll_per_token"], abs=near)
    named = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base)
    assert ModelCard.load(final / "README.md").data.base_model is None  # the hub takes ids alone


def test_the_snippet_of_a_reward_model_scores_as_it_was_evaluated(base, tmp_path):
    run, final = tmp_path / "r", tmp_path / "r" / "final"
    train(
        run, "stage=reward", f"model.path={base}", "lora=lora", "stage.normalize_prompts=0", *SMALL
    )
    _, names = snippet(final, "answers =")
    model, scores = names["model"].eval(), []
    assert model.config.pad_token_id == names["tokenizer"].pad_token_id
    for example in rows(base, tmp_path / "c"):
        ids = torch.tensor([*example.prompt_ids, *example.response_ids[0]]).long()[None]
        with torch.no_grad():
            scores.append(float(model(ids).logits))
    last = [row for row in metrics(run) if "eval/loss" in row][-1]
    assert sum(scores) / len(scores) == pytest.approx(last["eval/rewards/chosen"], abs=1e-4)


def test_an_adapter_on_an_adapter_names_the_base_and_the_reference_of_the_run(base, tmp_path):
    train(tmp_path / "sft", "stage=sft", f"model.path={base}", "lora=lora", *SMALL)
    words = ("lora=lora", "model.name=mine", *SMALL[2:])  # the rate is the stage's, times ten
    train(tmp_path / "dpo", "stage=dpo", f"model.path={tmp_path / 'sft'}", *words)
    final = tmp_path / "dpo" / "final"
    data, text = ModelCard.load(final / "README.md").data, (final / "README.md").read_text()
    assert (data.base_model, data.library_name) == (None, "peft")
    assert f"An adapter (PEFT) of {base.name} after Direct Preference Optimization" in text
    reference = json.loads((final / "dpo_run.json").read_text())["reference"]
    assert reference.startswith(str(tmp_path / "sft"))
    assert "reference: sft\n" in text
    assert str(tmp_path) not in text
    assert re.findall(r"^  lr: (.*)$", text, re.MULTILINE) == ["1.0e-05"]  # 1e-6 * 10


def test_a_base_of_the_hub_is_named_with_its_commit(tmp_path):
    made = {"base_model_name_or_path": "Qwen/Qwen3-8B", "revision": "b968826"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(made))
    own = {"name": "custom", "path": "runs/my-sft"}
    write_model_card(tmp_path, {"stage": "dpo", "adapter": True, "model": own})
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "Qwen/Qwen3-8B"
    text = (tmp_path / "README.md").read_text()
    assert "An adapter (PEFT) of Qwen/Qwen3-8B (revision b968826) after" in text
