"""Many families of decoders, as each is used in training: against its own plain forward."""

from typing import Any

import pytest
import torch
from peft import LoraConfig

from dpo_cli.errors import ConfigError
from dpo_cli.model import forward
from dpo_cli.model.adapters import lora
from dpo_cli.model.attention.interface import Placement, use_kernel
from dpo_cli.model.attention.probe import choose_attention
from dpo_cli.model.dropout import set_dropout
from dpo_cli.model.rope import cuts_of
from dpo_cli.model.skeleton import skeleton
from families import TRAINED, build_random
from small_models import examples, oracle, packed, packed_loss

IDS = torch.arange(3, 15)[None]
QUIET = (  # families without anything random
    "ernie4_5", "lfm2", "lfm2_moe", "mamba", "falcon_mamba", "mamba2", "mpt", "rwkv", "xlstm",
)  # fmt: skip
# Layers behind the last hidden states, and states that depend on what is padded behind a text.
REFUSED = ("modernbert-decoder", "xlstm", "recurrent_gemma")


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_trained_is_refused_in_a_line(family):
    with pytest.raises(ConfigError, match=r"^model\.attention=auto: .* cannot be used .*$"):
        choose_attention(build_random(family), "auto", on=Placement(note=lambda line: None))


@pytest.mark.parametrize("family", [name for name in TRAINED if name not in REFUSED])
def test_packed_and_padded_rows_are_right_and_train(family):
    model, rows = build_random(family), examples(3)
    expected = oracle(build_random(family), rows).detach()
    set_dropout(model, 0.0)
    choose_attention(model, "auto", on=Placement(note=lambda line: None))
    batch = packed(rows, cuts=cuts_of(model.config))
    loss, got = packed_loss(model.train(), batch)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert any(grad.norm() > 0 for grad in grads)
    use_kernel(model, "plain")
    padded = forward.token_logprobs(model, batch)
    torch.testing.assert_close(padded, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", TRAINED)
def test_nothing_is_random_in_training(family):
    """Though the family's configuration asks for dropout of every name, and for jitter."""
    model = build_random(family)
    truth = logits(model)
    model.train()
    assert torch.stack([logits(model) for _ in range(3)]).std(0).any() == (family not in QUIET)
    model.eval()
    set_dropout(model, 0.0)
    assert model.train() is model
    assert model.training
    for _ in range(2):
        assert torch.equal(logits(model), truth)
    model.eval()
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi", "starcoder2", "mpt"])
def test_dropout_that_is_asked_for_is_drawn(family):
    model = build_random(family)
    truth = logits(model)
    set_dropout(model, 0.2)
    model.train()
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(logits(model), truth)


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_routers_draw_nothing_beside_dropout(family):
    model = build_random(family)
    truth = logits(model)
    set_dropout(model, 1e-30)  # practically never
    torch.testing.assert_close(logits(model.train()), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_adapters_draw_at_their_own_rate(rate, dora):
    model = build_random("phimoe")
    set_dropout(model, 0.0)
    names = ["q_proj", "o_proj"]
    lora.add_adapter(
        model, LoraConfig(lora_dropout=rate, use_dora=dora, target_modules=names), None
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    truth = logits(model)
    model.train()
    assert torch.equal(logits(model), logits(model)) == (rate == 0.0)
    assert not any(part.training for name, part in model.named_modules() if "base_layer" in name)
    if rate == 0.0:
        torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-6)


def test_a_copy_trains_itself_alone():
    """The probe copies models that have been made ready."""
    model = build_random("llama")
    set_dropout(model, 0.0)
    few = skeleton(model, model.device)
    few.train()
    assert few.training
    assert not model.training
