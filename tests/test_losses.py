"""Losses against numbers worked by hand and against TRL's own code on random inputs."""

import itertools
import math
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from dpo_cli.config import LOSS_FACTS, DpoConfig
from dpo_cli.losses import (
    LOSSES,
    RankedLogprobs,
    hinge_loss,
    ipo_loss,
    plackett_luce_loss,
    preferences,
    sigmoid_loss,
    unlikelihood_loss,
)


def ranked(policy, reference, lengths=None) -> RankedLogprobs:
    policy, reference = torch.tensor(policy), torch.tensor(reference)
    lengths = torch.ones_like(policy) if lengths is None else torch.tensor(lengths)
    return RankedLogprobs(policy, reference, lengths)


# rho = (1, -2), so h = 3; rho per token = (0.25, -1), so h = 1.25
EXAMPLE = ranked([[-9.0, -14.0]], [[-10.0, -12.0]], [[4.0, 2.0]])


def test_sigmoid_by_hand():
    expected = math.log(1.0 + math.exp(-0.3))  # -log sigmoid(0.1 * 3)
    assert sigmoid_loss(EXAMPLE, beta=0.1).item() == pytest.approx(expected, abs=1e-6)


def test_identical_models_lose_ln_2():
    same = ranked([[-3.0, -8.0]], [[-3.0, -8.0]])
    assert sigmoid_loss(same, beta=5.0).item() == pytest.approx(math.log(2), abs=1e-7)


def test_label_smoothing_by_hand():
    kept, flipped = math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(0.3))
    expected = 0.9 * kept + 0.1 * flipped
    smoothed = sigmoid_loss(EXAMPLE, beta=0.1, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(expected, abs=1e-6)


def test_length_normalised_by_hand():
    expected = math.log(1 + math.exp(-2.0 * 1.25))
    assert sigmoid_loss(EXAMPLE, beta=2.0, length_normalized=True).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_hinge_by_hand():
    assert hinge_loss(EXAMPLE, beta=0.1).item() == pytest.approx(0.7, abs=1e-6)
    assert hinge_loss(EXAMPLE, beta=1.0).item() == 0.0


def test_ipo_by_hand():
    assert ipo_loss(EXAMPLE, beta=0.5).item() == pytest.approx((1.25 - 1.0) ** 2, abs=1e-6)


def test_unlikelihood_by_hand_ignores_the_reference():
    assert unlikelihood_loss(EXAMPLE, alpha=0.5).item() == pytest.approx(9.0 - 7.0)


def test_plackett_luce_by_hand():
    scores = ranked([[1.0, 0.0, -1.0]], [[0.0, 0.0, 0.0]])
    e = math.exp
    expected = -math.log(e(1) / (e(1) + 1 + e(-1))) - math.log(1 / (1 + e(-1)))
    assert plackett_luce_loss(scores, beta=1.0).item() == pytest.approx(expected, abs=1e-6)


def test_plackett_luce_of_two_is_dpo():
    torch.manual_seed(0)
    pairs = RankedLogprobs(torch.randn(20, 2), torch.randn(20, 2), torch.ones(20, 2))
    torch.testing.assert_close(plackett_luce_loss(pairs, 0.7), sigmoid_loss(pairs, 0.7))


def test_plackett_luce_probabilities_of_all_rankings_sum_to_one():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.1])
    total = sum(
        math.exp(-plackett_luce_loss(ranked([scores[list(p)].tolist()], [[0.0] * 4]), 1.0).item())
        for p in itertools.permutations(range(4))
    )
    assert total == pytest.approx(1.0, abs=1e-5)


def test_gradient_weight_is_the_papers():
    """Section 4: the gradient's weight is beta * sigmoid(r_l - r_w), up on w, down on l."""
    policy = torch.tensor([[-9.0, -14.0]], requires_grad=True)
    sigmoid_loss(RankedLogprobs(policy, EXAMPLE.reference, EXAMPLE.lengths), 0.1).sum().backward()
    weight = 0.1 / (1 + math.exp(0.3))
    torch.testing.assert_close(policy.grad, torch.tensor([[-weight, weight]]))


def test_tables_agree():
    assert set(LOSSES) == set(LOSS_FACTS)
    fields = set(DpoConfig.__dataclass_fields__)
    assert all(options <= fields for options in (loss.options for loss in LOSS_FACTS.values()))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (sigmoid_loss, "sigmoid"),
        (hinge_loss, "hinge"),
        (ipo_loss, "ipo"),
        (lambda x, b: sigmoid_loss(x, b, length_normalized=True), "sigmoid_norm"),
    ],
)
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_agrees_with_trl(ours, theirs, beta):
    """TRL's `_compute_loss` fed random token log-probabilities through a stand-in model."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    torch.manual_seed(int(beta * 100))
    pairs, length = 6, 9
    response_lengths = torch.randint(1, length, (2 * pairs,))
    mask = (torch.arange(length + 1) > 0) & (torch.arange(length + 1) <= response_lengths[:, None])
    policy = torch.randn(2 * pairs, length) * mask[:, 1:]
    reference = torch.randn(2 * pairs, length) * mask[:, 1:]
    loss = trl_loss(dpo_trainer, theirs, beta, policy, reference, mask.long())
    inputs = RankedLogprobs(
        policy.sum(1).view(2, pairs).T, reference.sum(1).view(2, pairs).T,
        response_lengths.view(2, pairs).T.float(),
    )  # fmt: skip
    torch.testing.assert_close(ours(inputs, beta).mean(), loss, rtol=1e-5, atol=1e-6)


class _Logs(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


def trl_loss(module, loss_type, beta, policy, reference, completion_mask):
    outputs = {
        "policy": SimpleNamespace(
            log_probs=policy, entropy=policy, mean_logits=policy, is_top1=policy > 0,
        ),
        "reference": SimpleNamespace(log_probs=reference),
    }  # fmt: skip
    trainer = SimpleNamespace(
        model=torch.nn.Identity(), accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False, beta=beta,
        ref_model=lambda **kwargs: outputs["reference"], f_divergence_type="reverse_kl",
        loss_types=[loss_type], loss_weights=[1.0], use_weighting=False, label_smoothing=0.0,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), _metrics=_Logs(
            train=_Logs(), eval=_Logs()), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    batch = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    with patch.object(module, "disable_gradient_checkpointing", lambda *a: nullcontext()):
        return module.DPOTrainer._compute_loss(trainer, lambda **k: outputs["policy"], batch, False)


def test_a_margin_within_rounding_is_a_tie():
    """2**-20 of 400 is 0.00038: what two packings of the same float32 sums may differ by."""
    margins = torch.tensor([0.0, 3e-4, -3e-4, 4e-4, -4e-4, 1.0])
    found = preferences(margins, torch.full((6,), 400.0))
    assert found.tolist() == [0.5, 0.5, 0.5, 1.0, 0.0, 1.0]
