"""stage=export: one dense folder out of an adapter or another model, and the hub."""

import json
import re
import shutil

import peft
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from composing import problems
from dpo_cli.errors import ConfigError
from dpo_cli.stages import export
from small_adapters import plain_logprobs, rows, write_base
from small_runs import train

SMALL = ("lora.r=4", "optim.lr=1e-2", "train.eval_every_steps=0", "train.sample_prompts=0",
         "train.max_steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """dora and qlora: of stage=dpo; reward: an adapter with its score."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("dora", "qlora"):
        train(folder / kind, "stage=dpo", f"model.path={base}", f"lora={kind}", *SMALL)
    words = ("lora=lora", "stage.normalize_prompts=4", "stage.normalize_max_new_tokens=4")
    train(folder / "reward", "stage=reward", f"model.path={base}", *words, *SMALL)
    return folder


def exported(folder, source, *words):
    train(folder, "stage=export", f"model.path={source}", *words)
    return folder / "final"


@pytest.mark.parametrize("kind", ["dora", "qlora"])
def test_an_adapter_is_merged_over_its_unquantised_base(base, runs, tmp_path, kind):
    final = exported(tmp_path / "e", runs / kind, "stage.dtype=fp32")
    pairs = rows(base, tmp_path / "c")[:4]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(runs / kind / "final")
    model = AutoModelForCausalLM.from_pretrained(final)
    found = plain_logprobs(model, pairs)
    torch.testing.assert_close(found, plain_logprobs(theirs, pairs), rtol=0, atol=2e-4)
    before = plain_logprobs(AutoModelForCausalLM.from_pretrained(base), pairs)
    assert (found - before).abs().max() > 0.1
    assert len(AutoTokenizer.from_pretrained(final)) == 1024
    assert not (final / "adapter_config.json").exists()
    said = json.loads((final / "dpo_run.json").read_text())
    assert said["reference"] == str(base)
    card = (final / "README.md").read_text()
    assert "Direct Preference Optimization" in card
    assert "library_name: transformers" in card


def test_bf16_is_the_rounded_float32(runs, tmp_path):
    half = load_file(
        exported(tmp_path / "half", runs / "dora", "stage.dtype=bf16") / "model.safetensors"
    )
    full = load_file(
        exported(tmp_path / "full", runs / "dora", "stage.dtype=fp32") / "model.safetensors"
    )
    assert half.keys() == full.keys()
    for name, value in full.items():
        assert value.dtype == torch.float32
        assert torch.equal(half[name], value.to(torch.bfloat16)), name


def stored(final):
    return {value.dtype for value in load_file(final / "model.safetensors").values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_base(base, runs, tmp_path, dtype):
    own = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(own)
    AutoTokenizer.from_pretrained(base).save_pretrained(own)
    adapter = tmp_path / "adapter"
    shutil.copytree(runs / "dora" / "final", adapter)
    facts = json.loads((adapter / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = str(own)
    (adapter / "adapter_config.json").write_text(json.dumps(facts))
    save_file({"state": torch.zeros(10**6)}, own / "optimizer.safetensors")  # of a checkpoint
    for source in (own, adapter):
        final = exported(tmp_path / f"e-{source.name}", source, "model.other_base=true")
        assert stored(final) == {dtype}


def test_a_base_in_float32_stays_so_but_for_a_quantised_run(base, runs, tmp_path, capsys):
    train(tmp_path / "a", "stage=export", f"model.path={runs / 'dora'}", "logger.progress=plain")
    told = " ".join(capsys.readouterr().err.split())
    assert f"{runs / 'dora' / 'final'} merged into {base} in fp32" in told
    assert "quantized as" not in told
    assert stored(tmp_path / "a" / "final") == {torch.float32}
    train(tmp_path / "b", "stage=export", f"model.path={runs / 'qlora'}", "logger.progress=plain")
    told = " ".join(capsys.readouterr().err.split())
    assert "in bf16" in told
    assert "it was trained on that base quantized as nf4" in told
    assert "close to the trained model, but not identical" in told
    assert stored(tmp_path / "b" / "final") == {torch.bfloat16}


def test_of_a_dense_model_only_the_dtype_changes(base, tmp_path):
    final = exported(tmp_path / "e", base, "stage.dtype=bf16")
    before = load_file(base / "model.safetensors")
    after = load_file(final / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value.to(torch.bfloat16)), name
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_reward_model_keeps_its_score_padding_and_spread(base, runs, tmp_path):
    final = exported(tmp_path / "e", runs / "reward", "stage.dtype=fp32")
    dense = AutoModelForSequenceClassification.from_pretrained(final).eval()
    adapter = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        runs / "reward" / "final", num_labels=1
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(runs / "reward" / "final")  # as it was trained
    assert tokenizer.pad_token_id != dense.config.eos_token_id
    assert dense.config.pad_token_id == tokenizer.pad_token_id
    adapter.config.pad_token_id = tokenizer.pad_token_id
    for example in rows(base, tmp_path / "c")[:3]:
        ids = torch.tensor([*example.prompt_ids, *example.response_ids[0]]).long()[None]
        with torch.no_grad():
            torch.testing.assert_close(dense(ids).logits, adapter(ids).logits, rtol=0, atol=1e-5)
    facts, own = (
        json.loads((folder / "dpo_run.json").read_text())["normalisation"]
        for folder in (final, runs / "reward" / "final")
    )
    assert facts == own
    words = ("stage=evaluate", f"model.path={base}", f"stage.reference={base}", "stage.prompts=2",
             "stage.max_new_tokens=4", "reward_fn=reward_model")  # fmt: skip
    a, b = (
        train(tmp_path / name, *words, f"reward_fn.path={folder}")["reward"]
        for name, folder in (("a", final), ("b", runs / "reward"))
    )
    assert a == pytest.approx(b, abs=1e-4)


def test_an_exported_policy_still_asks_for_its_reference(runs, tmp_path):
    final = exported(tmp_path / "e", runs / "dora")
    with pytest.raises(ConfigError, match="is itself a DPO policy"):
        train(tmp_path / "r", "stage=dpo", f"model.path={final}", "train.max_steps=1")


class Hub:
    """What is asked of the hub; it may refuse."""

    asked: list[tuple] = []  # noqa: RUF012
    error: Exception | None = None

    def create_repo(self, name, **options):
        if self.error is not None:
            raise self.error
        self.asked.append((name, options))

    def upload_folder(self, repo_id, folder_path, **options):
        names = {path.name for path in folder_path.iterdir()}
        self.asked.append((repo_id, names, options["ignore_patterns"]))


def test_the_folder_and_its_card_go_to_the_hub(base, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    exported(tmp_path / "e", base, "stage.push_to_hub=me/mine")
    (made, sent) = Hub.asked
    assert made == ("me/mine", {"private": True, "exist_ok": True})
    assert sent[0] == "me/mine"
    assert {"README.md", "model.safetensors", "tokenizer.json", "config.json"} <= sent[1]


def test_a_hub_that_refuses_is_one_line_and_the_folder_stays(base, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "HfApi", Hub)
    monkeypatch.setattr(Hub, "error", LocalTokenNotFoundError("Token is required\n(more)"))
    with pytest.raises(ConfigError, match=r"push_to_hub=me/mine: Token is required \(log") as told:
        exported(tmp_path / "e", base, "stage.push_to_hub=me/mine")
    assert "\n" not in str(told.value)
    assert (tmp_path / "e" / "final" / "model.safetensors").is_file()


def test_without_a_network_it_is_one_line(base, tmp_path):
    with pytest.raises(
        ConfigError, match=r"push_to_hub=me/mine: .*the exported model is in"
    ) as told:
        exported(tmp_path / "e", base, "stage.push_to_hub=me/mine")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stage.push_to_hub=mine", "stage.push_to_hub=mine: must be owner/name"),
        ("stage.dtype=fp16", "stage.dtype=fp16: must be one of auto, bf16, fp32"),
        ("hardware.precision=bf16", "hardware.precision=bf16: has no effect with stage=export"),
        ("hardware.devices=2", "hardware.devices=2: has no effect with stage=export"),
        ("optim.lr=1", "optim.lr=1.0: has no effect with stage=export, which trains nothing"),
        ("train.epochs=2", "train.epochs=2.0: has no effect with stage=export"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    typed = ["stage=export", "model=gpt2", words]
    told = problems(typed, typed)
    assert any(message in line for line in told), told


def test_the_card_tells_base_results_and_command_without_a_local_path(
    base, runs, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    exported(tmp_path / "e", runs / "dora", "stage.push_to_hub=me/mine", "stage.dtype=fp32")
    card = (tmp_path / "e" / "final" / "README.md").read_text()
    assert "llama after Direct Preference Optimization on" in card  # the base, not model=tiny
    assert re.search(r"\| Held-out loss \| 0\.\d{3} \|", card)
    assert "dpo-run stage=dpo model.path=llama lora=dora" in card
    for folder in (base, runs, tmp_path):
        assert str(folder) not in card
    _, sent = Hub.asked
    assert {"dpo_run.json", "trained_prompts.bin"} <= set(sent[2])  # paths and hashes stay here
    known = (runs / "dora" / "final" / "trained_prompts.bin").read_bytes()
    assert (tmp_path / "e" / "final" / "trained_prompts.bin").read_bytes() == known


def test_the_card_of_an_earlier_checkpoint_has_no_figures_of_the_last_step(base, tmp_path):
    saved = ("train.max_steps=2", "train.save_every_steps=1", "train.sample_prompts=2")
    train(tmp_path / "run", "stage=sft", f"model.path={base}", *SMALL[1:3], *saved)
    cards = []
    for step in (1, 2):
        out = exported(tmp_path / f"e{step}", tmp_path / f"run/checkpoints/step-{step}")
        cards.append((out / "README.md").read_text())
    for part in ("| Held-out loss |", "## Samples"):
        assert part not in cards[0]
        assert part in cards[1]  # the same as final/
    assert all("dpo-run stage=sft model.path=llama" in card for card in cards)
