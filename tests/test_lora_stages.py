"""Whole runs with adapters: each stage and kind, the reference, resuming, what reads an adapter."""

import json
import math
import subprocess
import sys

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from composing import composed, problems
from dpo_cli.config.read import prepare
from dpo_cli.durable import file_digest
from dpo_cli.errors import ConfigError
from dpo_cli.model import load
from dpo_cli.plan.dry_run import plan_rows
from dpo_cli.session import reference
from small_adapters import plain_logprobs, rows, write_base
from small_runs import TINY, configure, killed_at, metrics, train

SMALL = ("lora.r=4", "optim.lr=1e-2", "train.eval_every_steps=0", "train.sample_prompts=0",
         "logger.report=false")  # fmt: skip
PPO = (
    "stage=ppo-baseline", "stage.rollout_samples=8", "stage.max_new_tokens=6",
    "stage.normalize_prompts=4", "stage.eval_prompts=2", "train.max_steps=2", "stage.ppo_epochs=2",
)  # fmt: skip
STAGES = {
    "sft": ("stage=sft", "train.max_steps=2"),
    "dpo": ("stage=dpo", "train.max_steps=2"),
    "reward": ("stage=reward", "train.max_steps=2", "stage.normalize_prompts=2"),
    "ppo-baseline": PPO,
}
ADAPTER = "final/adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def sft(base, tmp_path_factory):
    """An adapter that stage=sft trained."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    train(folder, *STAGES["sft"], f"model.path={base}", "lora=lora", *SMALL)
    return folder


@pytest.fixture(scope="module")
def dpo(sft, tmp_path_factory):
    """A policy trained on from it, all held-out figures at the start and the end."""
    folder = tmp_path_factory.mktemp("runs") / "dpo"
    train(folder, *STAGES["dpo"], f"model.path={sft}", "lora=lora", *SMALL)
    return folder


@pytest.fixture
def bases_read(monkeypatch):
    """How often a base model is read in."""
    read, real = [], load.read_pretrained
    counted = lambda *a, **k: read.append(1) or real(*a, **k)  # noqa: E731
    monkeypatch.setattr(load, "read_pretrained", counted)
    return read


def column(run_dir, name):
    return [row[name] for row in metrics(run_dir) if name in row]


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora", "int8"])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo-baseline"])  # dpo: below
def test_every_stage_trains_every_kind(base, tmp_path, stage, kind):
    train(tmp_path / "r", *STAGES[stage], f"model.path={base}", f"lora={kind}", *SMALL)
    assert all(math.isfinite(loss) for loss in column(tmp_path / "r", "loss"))
    names = {path.name for path in (tmp_path / "r" / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    facts = json.loads((tmp_path / "r" / "final" / "adapter_config.json").read_text())
    reward = stage == "reward"
    assert facts["task_type"] == ("SEQ_CLS" if reward else "CAUSAL_LM")
    assert facts["modules_to_save"] == (["score"] if reward else None)
    assert facts["base_model_name_or_path"] == str(base.resolve())


@pytest.mark.parametrize(
    ("kind", "live"),
    [("lora", "cached"), ("lora", "live"), ("dora", "live"), ("qlora", "live"), ("int8", "cached")],
)
def test_dpo_starts_at_ln_2(base, sft, tmp_path, kind, live, bases_read):
    """From a base and from an adapter; the base lies in memory once."""
    words = ("stage=dpo", "train.max_steps=1", f"stage.reference_logprobs={live}")
    train(tmp_path / "a", *words, f"model.path={base}", f"lora={kind}", *SMALL)
    assert column(tmp_path / "a", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    again = (*words, f"model.path={sft}", *SMALL)
    if kind == "dora":  # the adapter is none
        with pytest.raises(ConfigError, match=r"lora\.use_dora=True: the adapter in .* has False"):
            train(tmp_path / "b", *again, "lora=dora")
        return
    train(tmp_path / "b", *again, f"lora={kind}")
    assert column(tmp_path / "b", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(bases_read) == 2


def test_dora_in_bf16_over_4_bits_starts_nearly_there(base, tmp_path):
    """PEFT takes the norms of these weights in bf16 at each forward."""
    words = ("lora=qlora", "lora.use_dora=true", "hardware.precision=bf16", *SMALL)
    train(tmp_path / "r", "stage=dpo", "train.max_steps=1", f"model.path={base}", *words)
    assert column(tmp_path / "r", "loss")[0] == pytest.approx(math.log(2), abs=5e-3)


@pytest.mark.parametrize("live", ["cached", "live"])
def test_the_reference_is_the_policy_the_run_started_from(sft, tmp_path, live):
    """By PEFT's own model of the SFT run, after the trained adapter has moved away."""
    train(tmp_path / "r", *STAGES["dpo"], f"model.path={sft}", "lora=lora", *SMALL,
          f"stage.reference_logprobs={live}")  # fmt: skip
    last = [row for row in metrics(tmp_path / "r") if "eval/loss" in row][-1]
    assert abs(last["eval/logratios/chosen"]) > 0.1
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(sft / "final")
    expected = plain_logprobs(theirs, rows(sft / "final", tmp_path / "c")).mean(0)
    for i, name in enumerate(("chosen", "rejected")):
        found = last[f"eval/logps/{name}"] - last[f"eval/logratios/{name}"]
        assert found == pytest.approx(float(expected[i]), abs=1e-3)
    policy = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "r" / "final")
    ours = plain_logprobs(policy, rows(sft / "final", tmp_path / "c")).mean(0)
    assert last["eval/logps/chosen"] == pytest.approx(float(ours[0]), abs=1e-3)
    said = json.loads((tmp_path / "r" / "final" / "dpo_run.json").read_text())
    assert said["reference"] == str(sft)


def test_full_and_adapter_runs_share_the_cached_reference(base, tmp_path, monkeypatch):
    passes, real = [], reference.compute
    monkeypatch.setattr(reference, "compute", lambda *a: passes.append(a[-1]) or real(*a))
    words = (f"model.path={base}", f"cache_dir={tmp_path / 'cache'}", "stage=dpo",
             "train.max_steps=1", *SMALL[1:])  # fmt: skip
    train(tmp_path / "full", *words)
    assert len(passes) == 2  # train and eval
    train(tmp_path / "lora", *words, "lora=lora")
    assert len(passes) == 2
    for i, other in enumerate(("lora=qlora", "hardware.precision=bf16 lora=lora"), start=2):
        train(tmp_path / str(i), *words, *other.split())
        assert len(passes) == 2 * i  # rounded otherwise


@pytest.mark.parametrize(
    ("stage", "kind", "start"),
    [("sft", "dora", "base"), ("dpo", "lora", "adapter"), ("dpo", "qlora", "adapter"),
     ("reward", "lora", "adapter"), ("ppo-baseline", "lora", "adapter")],
)  # fmt: skip
def test_resumed_equals_uninterrupted(base, sft, tmp_path, monkeypatch, stage, kind, start,
                                      bases_read):  # fmt: skip
    """Dropout on; killed after half of the steps; live reference. Bit for bit."""
    first = {"base": base, "adapter": sft}[start]
    common = (*STAGES[stage], f"model.path={first}", f"lora={kind}", *SMALL, "train.max_steps=4",
              "train.save_every_steps=2")  # fmt: skip
    common += ("stage.reference_logprobs=live",) if stage == "dpo" else ()
    common += () if stage == "ppo-baseline" else ("lora.dropout=0.2",)
    common += ("stage.normalize_prompts=0",) if stage == "reward" else ()
    train(tmp_path / "whole", *common)
    with killed_at(3):
        train(tmp_path / "cut", *common)
    before = len(bases_read)
    train(tmp_path / "cut", *common, "resume=true")
    assert len(bases_read) - before <= 1
    assert file_digest(tmp_path / "whole" / ADAPTER) == file_digest(tmp_path / "cut" / ADAPTER)
    config = "final/adapter_config.json"
    assert (tmp_path / "whole" / config).read_text() == (tmp_path / "cut" / config).read_text()


def test_a_tuned_adapter_needs_its_reference_named_and_shares_the_base(
    sft, dpo, tmp_path, bases_read
):
    words = (*STAGES["dpo"], "lora=lora", *SMALL)
    checkpoint = dpo / "checkpoints" / "step-2"
    for folder in (dpo, checkpoint):
        with pytest.raises(ConfigError, match=r"is itself a DPO policy.*stage\.reference="):
            train(tmp_path / "r", *words, f"model.path={folder}")
    bases_read.clear()
    for live in ("cached", "live"):
        train(tmp_path / live, *words, f"model.path={checkpoint}", f"stage.reference={sft}",
              f"stage.reference_logprobs={live}")  # fmt: skip
    assert len(bases_read) == 2
    before = [row for row in metrics(dpo) if "eval/loss" in row][-1]
    after = next(row for row in metrics(tmp_path / "live") if "eval/loss" in row)
    assert after["eval/logratios/chosen"] == pytest.approx(
        before["eval/logratios/chosen"], abs=1e-4
    )


def test_without_lora_an_adapter_is_merged_and_trained_whole(sft, tmp_path):
    train(tmp_path / "r", *STAGES["dpo"], f"model.path={sft}", *SMALL[1:])
    assert column(tmp_path / "r", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert (tmp_path / "r" / "final" / "model.safetensors").is_file()


def test_a_reward_model_on_an_sft_adapter(sft, tmp_path):
    """The body goes on from it, the score is new; PEFT reads the same rewards."""
    words = ("lora=lora", *SMALL, "train.max_steps=1", "stage=reward", "stage.normalize_prompts=2")
    train(tmp_path / "r", *words, f"model.path={sft}")
    final = tmp_path / "r" / "final"
    card = (final / "README.md").read_text()
    assert "library_name: peft" in card
    assert "num_labels=1" in card
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(final, num_labels=1)
    plain = AutoModelForSequenceClassification.from_pretrained(final, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(final)
    pad = tokenizer.pad_token_id
    pairs, found = rows(final, tmp_path / "c"), []
    for their in (model.eval(), plain.eval()):
        their.config.pad_token_id = pad
        found.append(torch.tensor([
            [their(torch.tensor([*e.prompt_ids, *r]).long()[None]).logits.item()
             for r in e.response_ids] for e in pairs
        ]))  # fmt: skip
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    last = [row for row in metrics(tmp_path / "r") if "eval/loss" in row][-1]
    for i, name in enumerate(("chosen", "rejected")):
        assert last[f"eval/rewards/{name}"] == pytest.approx(float(found[0][:, i].mean()), abs=1e-4)
    train(tmp_path / "on", *words, f"model.path={tmp_path / 'r'}")
    first = next(row for row in metrics(tmp_path / "on") if "eval/loss" in row)
    assert first["eval/loss"] == pytest.approx(last["eval/loss"], abs=1e-5)
    with pytest.raises(ConfigError, match="is the adapter of a reward model, not of a policy"):
        train(tmp_path / "no", *STAGES["sft"], f"model.path={tmp_path / 'r'}", *SMALL[1:])


def test_stages_that_read_models_read_adapters(base, sft, dpo, tmp_path):
    train(tmp_path / "rm", *STAGES["reward"], f"model.path={sft}", "lora=lora", *SMALL)
    by = ("reward_fn=reward_model", f"reward_fn.path={tmp_path / 'rm'}")
    small = ("stage.prompts=3", "stage.max_new_tokens=6")
    figures = train(tmp_path / "e", "stage=evaluate", f"model.path={dpo}", *by, *small)
    assert figures["kl"] > 0.0  # to the SFT run, which its own folder names
    train(tmp_path / "all", "stage=evaluate", f"stage.policies=[{dpo},{sft},{base}]",
          "stage.checkpoints=true", f"stage.reference={sft}", *by, *small)  # fmt: skip
    points = [json.loads(x) for x in (tmp_path / "all" / "points.jsonl").read_text().splitlines()]
    kls = {point["policy"]: point["kl"] for point in points}
    assert kls[str(sft)] == 0.0
    assert kls[str(base)] > 0.0
    train(tmp_path / "s", "stage=sample", f"model.path={dpo}", "stage.prompts=4",
          "stage.eval_prompts=0", "stage.max_new_tokens=6")  # fmt: skip
    for words in (("stage.by=implicit", f"model.path={dpo}"), by):
        run = tmp_path / words[0].partition("=")[2]
        train(run, "stage=label", f"stage.samples={tmp_path / 's'}", *words)
        assert (run / "train.jsonl").read_text()


def test_the_plan_counts_what_is_trained(base, sft, tmp_path):
    words = (*TINY, *STAGES["dpo"], f"run_dir={tmp_path}", f"cache_dir={tmp_path}", "lora.r=4")
    told = dict(plan_rows(configure(*words, f"model.path={base}", "lora=qlora")))["trained"]
    # of 2 layers: q, o 32 -> 32; k, v 32 -> 16; gate, up 32 -> 48; down 48 -> 32; at rank 4
    weights = 2 * 4 * (2 * 64 + 2 * 48 + 2 * 80 + 80)
    assert told == f"{weights:,} weights (LoRA r 4), 0.1M frozen in nf4"
    on = dict(plan_rows(configure(*words, f"model.path={sft}", "lora=lora")))["trained"]
    assert on == f"{weights:,} weights of its adapter, 0.1M frozen"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lora=lora", "lora=lora: model=tiny has random weights, which an adapter check"),
        ("lora=lora model=gpt2 lora.target_modules=[]", "lora.target_modules=[]: must be [all-li"),
        ("lora=int8 model=gpt2 lora.use_dora=true", "ignores the scales of int8 weights"),
        ("lora=lora model=gpt2 lora.r=0", "lora.r=0: must be at least 1"),
        ("lora=lora model=gpt2 lora.lr_scale=0", "lora.lr_scale=0.0: must be above 0"),
        ("lora=lora model=gpt2 lora.quantization=fp4", "must be one of nf4, int8"),
        ("lora.r=8", "no effect with lora=none, which trains all weights; add lora=lora"),
        ("lora.quantization=nf4", "with lora=none, which trains all weights; add lora=qlora"),
        ("stage=sample lora=lora", "lora=lora: has no effect with stage=sample, which trains no"),
        ("stage=export model=gpt2 lora=lora lora.r=2", "lora.r=2: has no effect with stage=export"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    told = problems(words.split(), words.split())
    assert any(message in line for line in told), told


def test_the_default_rate_is_ten_times_that_of_all_weights():
    for words, rate in (("lora=lora", 1e-5), ("lora=dora lora.lr_scale=3", 3e-6), ("", 1e-6)):
        config = prepare(composed("stage=dpo", "model=gpt2", *words.split()))
        assert config.optim.lr == pytest.approx(rate)
    config = prepare(composed("stage=dpo", "model=gpt2", "lora=lora", "optim.lr=5e-5"))
    assert config.optim.lr == 5e-5


def test_peft_is_not_imported_without_adapters():
    """It takes a second, and warns."""
    code = "import sys, dpo_cli.stages.dpo, dpo_cli.plan.dry_run; sys.exit('peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
