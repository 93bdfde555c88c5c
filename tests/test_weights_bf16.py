"""hardware.weights=bf16: what it rounds away, says, saves and resumes."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_cli.config import HardwareConfig, OptimConfig
from dpo_cli.errors import ConfigError
from dpo_cli.session.precision import hold_as_trained
from dpo_cli.train import loop
from dpo_cli.train.optim import build_optimizer, global_grad_norm, take_step, warmup_steps
from dpo_cli.train.rounding import changed_share, rounding_note, watch
from small_models import FAMILIES, build, examples, packed, packed_loss
from small_runs import configure, metrics, train

HALF = ("hardware.precision=bf16", "hardware.weights=bf16")
QUIET = ("train.sample_prompts=0", "data.eval_rows=0")
BF16 = HardwareConfig(weights="bf16")


def twenty_steps(weights):
    """Of AdamW at DPO's learning rate; (share of changed weights, change of the loss)."""
    model = build("llama", {**FAMILIES["llama"], "vocab_size": 96}).float()
    hold_as_trained(model, HardwareConfig(weights=weights))
    batch = packed(examples(2))
    optimizer = build_optimizer(model, OptimConfig(), 1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    first = exact_loss(model, batch)
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = packed_loss(model, batch)
        loss.backward()
        take_step(model, optimizer, 1.0, 10.0, 1e-6)
    pairs = list(zip(model.parameters(), before, strict=True))
    moved = sum(int((p != b).sum()) for p, b in pairs)
    return moved / sum(b.numel() for b in before), exact_loss(model, batch) - first


def exact_loss(model, batch):
    wide = build("llama", {**FAMILIES["llama"], "vocab_size": 96})
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    with torch.no_grad():
        return float(packed_loss(wide, batch)[0])


def test_small_steps_are_lost_in_bf16_and_kept_in_fp32():
    share, change = twenty_steps("fp32")
    rounded, _ = twenty_steps("bf16")
    assert share > 0.9  # all but the embeddings of tokens that are not in the batch
    assert change < -1e-4
    assert rounded < 0.02


def test_only_weights_are_rounded():
    model = build("llama").float()
    angles = model.model.rotary_emb.inv_freq.clone()
    hold_as_trained(model, BF16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, angles)
    tied = build("gpt2").float()
    hold_as_trained(tied, BF16)
    assert tied.lm_head.weight is tied.transformer.wte.weight


@pytest.mark.parametrize(
    ("stage", "optimiser"),
    [("sft", "adamw"), ("dpo", "rmsprop"), ("dpo", "adamw8bit"), ("reward", "adamw")],
)
def test_a_run_resumes_bit_for_bit(stage, optimiser, tmp_path, monkeypatch):
    common = (f"stage={stage}", *HALF, *QUIET, f"optim={optimiser}", "optim.lr=1e-3",
              "train.max_steps=4", "train.save_every_steps=2", "model.dropout=0.1")  # fmt: skip
    train(tmp_path / "whole", *common)
    real = loop._train_step

    def die_at_three(run):
        if run.step == 3:
            raise KeyboardInterrupt
        return real(run)

    monkeypatch.setattr(loop, "_train_step", die_at_three)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", *common)
    monkeypatch.setattr(loop, "_train_step", real)
    train(tmp_path / "cut", *common, "resume=true")
    whole, cut = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "cut")
    )
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    state = load_file(tmp_path / "cut/checkpoints/step-4/optimizer.safetensors")
    moments = {v.dtype for k, v in state.items() if k.endswith(("exp_avg", "square_avg"))}
    assert optimiser == "adamw8bit" or moments == {torch.bfloat16}


def test_what_is_saved_loads_and_goes_on(tmp_path):
    train(tmp_path / "sft", "stage=sft", *HALF, "optim.lr=1e-3", "train.max_steps=2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft/final")
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()
    train(tmp_path / "dpo", "stage=dpo", *HALF, f"model.path={tmp_path / 'sft'}",
          "train.max_steps=2")  # fmt: skip
    losses = [row["eval/loss"] for row in metrics(tmp_path / "dpo") if "eval/loss" in row]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)  # policy and reference are the same


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_dpo_from_float32_weights_starts_at_ln_2(reference, tmp_path):
    train(tmp_path / "r", "stage=dpo", *HALF, *QUIET, "train.max_steps=1",
          f"stage.reference_logprobs={reference}")  # fmt: skip
    (loss,) = [row["loss"] for row in metrics(tmp_path / "r") if "loss" in row]
    assert loss == pytest.approx(0.693147, abs=1e-5)


def test_ppo_trains(tmp_path):
    train(tmp_path / "r", "stage=ppo-baseline", *HALF, *QUIET, "stage.rollout_samples=8",
          "stage.max_new_tokens=6", "stage.ppo_epochs=1", "reward_fn=length", "train.max_steps=1",
          "stage.no_eos_score=null", "stage.normalize=false")  # fmt: skip
    (row,) = [row for row in metrics(tmp_path / "r") if "kl" in row]
    assert row["kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(("lr", "told"), [("1e-6", 1), ("1e-2", 0)])
def test_the_user_is_told_once_after_the_warm_up(lr, told, tmp_path, capsys):
    train(tmp_path / "r", "stage=sft", *HALF, *QUIET, f"optim.lr={lr}", "optim.warmup_steps=2",
          "train.max_steps=4", "logger.progress=plain")  # fmt: skip
    lines = [x for x in capsys.readouterr().err.splitlines() if "rounded away" in x]
    assert len(lines) == told
    for line in lines:
        assert re.fullmatch(r"hardware\.weights=bf16: only [0-9]% of the weights changed in a step "
                            r"at the learning rate 1e-06, the other updates were rounded away; use "
                            r"hardware\.weights=fp32", line)  # fmt: skip


def test_float32_weights_are_not_watched(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "watch", lambda weights: seen.append(watch(weights)) or seen[-1])
    train(tmp_path / "r", "stage=sft", *QUIET, "train.max_steps=2")
    assert seen == [[]]


def test_the_share_by_hand():
    """Of four weights with a gradient one is small enough to move; one has no gradient."""
    weight = torch.tensor([1.0, -2.0, 0.5, 1e-7, 1.0], dtype=torch.bfloat16, requires_grad=True)
    weight.grad = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.bfloat16)
    watched = watch([weight, torch.ones(3, requires_grad=True)])
    with torch.no_grad():
        weight.sub_(torch.full((5,), 1e-6, dtype=torch.bfloat16))
    assert changed_share(watched) == 0.25
    assert rounding_note(0.25, 1e-6).startswith("hardware.weights=bf16: only 25% of the weights")
    assert rounding_note(0.5, 1e-6) is None
    assert changed_share([]) == 1.0


def test_only_part_of_a_large_weight_is_looked_at():
    weight = torch.zeros(300_000, dtype=torch.bfloat16, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    (watched,) = watch([weight])
    assert 2**15 <= len(watched.values) <= 2**16
    with torch.no_grad():
        weight[:150_000] = 1.0
    assert changed_share([watched]) == pytest.approx(0.5, abs=1e-4)


def test_the_norm_of_half_precision_gradients_is_not_rounded():
    weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    other = torch.nn.Parameter(torch.ones(3))
    weight.grad, other.grad = torch.full_like(weight, 0.1), torch.full_like(other, 2.0)
    exact = (1000 * float(weight.grad[0]) ** 2 + 12.0) ** 0.5
    assert float(global_grad_norm([weight, other])) == pytest.approx(exact, rel=1e-5)


def test_the_full_learning_rate_comes_with_the_last_warm_up_step():
    assert warmup_steps(OptimConfig(warmup_steps=7), 100) == 7
    assert warmup_steps(OptimConfig(warmup_ratio=0.1), 100) == 10


def test_it_needs_autocast(tmp_path):
    with pytest.raises(ConfigError, match=r"^hardware\.weights=bf16: needs hardware\.precision=bf"):
        configure("model=tiny", "stage=sft", "hardware.weights=bf16", "hardware.precision=fp32")
    with pytest.raises(ConfigError, match=r"needs hardware\.precision=bf16 \(here auto is fp32\)"):
        train(tmp_path / "r", "stage=sft", "hardware.weights=bf16")
    assert configure("model=tiny", "stage=sft", *HALF).hardware.weights == "bf16"
