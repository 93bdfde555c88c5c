"""Hidden states between blocks, rounded to bf16."""

import pytest
import torch

from dpo_cli.errors import ConfigError
from dpo_cli.model import forward
from dpo_cli.model.attention import interface
from dpo_cli.model.fuse import round_residual
from small_models import build, examples, gradients, packed, packed_loss
from small_runs import configure, metrics, train


def figures(model, half):
    seen = []
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for block in blocks:
        block.register_forward_hook(lambda m, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss, values = packed_loss(model, packed(examples(2)))
    return values.detach(), torch.cat([g.flatten() for g in gradients(model, loss).values()]), seen


def model_of(family):
    model = build(family).float()
    interface.use_kernel(model, "sdpa")
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_blocks_hand_on_half_precision_under_autocast_alone(family):
    plain = {half: figures(model_of(family), half) for half in (True, False)}
    for half in (True, False):
        model = model_of(family)
        round_residual(model)
        values, grads, dtypes = figures(model, half)
        if half:
            assert set(dtypes) == {torch.bfloat16}
            assert set(plain[half][2]) == {torch.float32}
            # as near the float32 run as bf16 products are without it, twice over
            exact, before = plain[False], plain[True]
            assert (values - exact[0]).norm() < 3 * (before[0] - exact[0]).norm()
            assert (grads - exact[1]).norm() < 3 * (before[1] - exact[1]).norm()
        else:
            assert torch.equal(values, plain[half][0])
            assert torch.equal(grads, plain[half][1])


def test_cached_references_are_told_apart():
    model = model_of("gpt2")
    assert forward.computed_by(model) == "sdpa"
    round_residual(model)
    assert forward.computed_by(model) == "sdpa rounded"


def test_a_run_starts_at_ln_2(tmp_path):
    train(tmp_path / "r", "stage=dpo", "train.max_steps=2", "train.sample_prompts=0",
          "hardware.precision=bf16", "hardware.residual=bf16")  # fmt: skip
    losses = [row["loss"] for row in metrics(tmp_path / "r") if "loss" in row]
    assert losses[0] == pytest.approx(0.693147, abs=2e-3)


def test_not_in_float32():
    with pytest.raises(ConfigError, match=r"^hardware\.residual=bf16: needs hardware\.precision"):
        configure("stage=sft", "hardware.residual=bf16", "hardware.precision=fp32")


def test_not_where_auto_comes_to_float32(tmp_path):
    with pytest.raises(ConfigError, match=r"^hardware\.residual=bf16: .* \(here auto is fp32\)"):
        train(tmp_path / "r", "stage=sft", "hardware.residual=bf16", "hardware.precision=auto")
