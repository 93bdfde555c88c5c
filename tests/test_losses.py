"""Losses against numbers worked by hand and against TRL's own code on random inputs."""

import itertools
import math
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.config import DpoConfig
from dpo_cli.config.paths import recipes_dir
from dpo_cli.losses import LOSSES, RankedLogprobs, preferences
from dpo_cli.losses.diagnostics import (
    CORRELATION,
    diagnostics,
    moments,
    warning,
    with_correlation,
)
from dpo_cli.losses.pairwise import (
    aot_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    cpo_loss,
    discopop_loss,
    dpop_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    ipo_sum_loss,
    nca_loss,
    orpo_loss,
    rdpo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
    sppo_loss,
    unlikelihood_loss,
)
from dpo_cli.losses.ranked import DIVERGENCES
from dpo_cli.losses.ranking import plackett_luce_loss
from dpo_cli.stages.preference import loss_of_lists, objective, sequence_sums


def ranked(policy, reference, lengths=None) -> RankedLogprobs:
    policy, reference = torch.tensor(policy), torch.tensor(reference)
    lengths = torch.ones_like(policy) if lengths is None else torch.tensor(lengths)
    return RankedLogprobs(policy, reference, lengths)


OWN = str(recipes_dir() / "my_loss.py")

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


def log_sigmoid(z: float) -> float:
    return -math.log(1.0 + math.exp(-z))


def sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


BY_HAND = {  # of EXAMPLE, whose log pi is (-9, -14), whose log pi per token is (-2.25, -7)
    "robust": (
        robust_loss, {"beta": 0.1, "label_smoothing": 0.2},
        (-0.8 * log_sigmoid(0.3) + 0.2 * log_sigmoid(-0.3)) / 0.6,
    ),
    "ipo_sum": (ipo_sum_loss, {"beta": 0.5}, (3.0 - 1.0) ** 2),
    "exo": (
        exo_loss, {"beta": 0.1, "label_smoothing": 0.2},
        sigmoid(0.3) * math.log(sigmoid(0.3) / 0.8) + sigmoid(-0.3) * math.log(sigmoid(-0.3) / 0.2),
    ),
    "dpop": (dpop_loss, {"beta": 0.1, "dpop_lambda": 5.0}, -log_sigmoid(0.3)),  # rho_w is above 0
    "rdpo": (rdpo_loss, {"beta": 0.1, "length_penalty": 0.05}, -log_sigmoid(0.3 + 0.05 * 2)),
    "nca": (
        nca_loss, {"beta": 0.1},
        -log_sigmoid(0.1) - 0.5 * log_sigmoid(-0.1) - 0.5 * log_sigmoid(0.2),
    ),
    "bco": (bco_loss, {"beta": 0.1}, -log_sigmoid(0.1) - log_sigmoid(0.2)),
    "sppo": (sppo_loss, {"beta": 0.5}, (1.0 - 1.0) ** 2 + (-2.0 + 1.0) ** 2),
    "aot": (aot_loss, {"beta": 0.1, "label_smoothing": 0.0}, -log_sigmoid(0.3)),  # one pair
    "apo_zero": (apo_zero_loss, {"beta": 0.1}, 1.0 - sigmoid(0.1) + sigmoid(-0.2)),
    "apo_down": (apo_down_loss, {"beta": 0.1}, sigmoid(0.1) + 1.0 - sigmoid(0.3)),
    "discopop": (
        discopop_loss, {"beta": 0.1, "discopop_tau": 0.2},
        -log_sigmoid(0.3) * (1.0 - sigmoid(1.5)) + math.exp(-0.3) * sigmoid(1.5),
    ),
    "simpo": (
        simpo_loss, {"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.0},
        -log_sigmoid(2.0 * 4.75 - 1.0),
    ),
    "cpo": (cpo_loss, {"beta": 0.1, "label_smoothing": 0.0}, -log_sigmoid(0.1 * 5.0) + 2.25),
    "orpo": (
        orpo_loss, {"beta": 0.1},
        2.25 - 0.1 * log_sigmoid(
            math.log(math.exp(-2.25) / (1 - math.exp(-2.25)))
            - math.log(math.exp(-7.0) / (1 - math.exp(-7.0)))
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    loss, options, expected = BY_HAND[name]
    assert LOSSES[name].compute is loss
    assert set(options) == LOSSES[name].arguments
    assert loss(EXAMPLE, **options).item() == pytest.approx(expected, rel=1e-5)


def test_a_chosen_response_that_became_less_likely_costs_dpop():
    pair = ranked([[-3.0, -9.0]], [[-2.0, -4.0]])  # rho = (-1, -5)
    expected = -log_sigmoid(0.1 * (4.0 - 5.0 * 1.0))
    assert dpop_loss(pair, 0.1, 5.0).item() == pytest.approx(expected, rel=1e-6)


def test_aot_compares_sorted_distributions():
    pairs = ranked([[-1.0, -4.0], [-2.0, -1.0]], [[-3.0, -3.5], [-1.0, -3.0]])
    # policy differences (3, -1), the reference's (0.5, 2): sorted -1 with 0.5, 3 with 2
    expected = [-log_sigmoid(-1.5), -log_sigmoid(1.0)]
    assert aot_loss(pairs, beta=1.0).tolist() == pytest.approx(expected, rel=1e-6)


def test_discopop_is_finite_far_out():
    pair = ranked([[-4000.0, -1.0]], [[-1.0, -1.0]])
    pair.policy.requires_grad_()
    loss = discopop_loss(pair, beta=0.5)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.5 * 3999, rel=1e-6)
    assert torch.isfinite(pair.policy.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_all_pairs_of_two_are_the_pair(name):
    torch.manual_seed(1)
    pairs = RankedLogprobs(
        -4 * torch.rand(20, 2) - 1, -4 * torch.rand(20, 2) - 1, torch.randint(1, 9, (20, 2)).float()
    )
    stage = DpoConfig(loss=name, label_smoothing=0.1, loss_file=OWN)
    plain = LOSSES[name].compute(
        pairs, **{key: getattr(stage, key) for key in LOSSES[name].arguments}
    )
    assert torch.equal(loss_of_lists(name, pairs, stage), plain)


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if not loss.lists])
def test_a_list_is_the_mean_over_its_pairs(name):
    torch.manual_seed(2)
    lists = RankedLogprobs(
        -4 * torch.rand(1, 4) - 1, -4 * torch.rand(1, 4) - 1, torch.randint(1, 9, (1, 4)).float()
    )
    stage = DpoConfig(loss=name, label_smoothing=0.1, loss_file=OWN)
    if LOSSES[name].together:
        pytest.skip("no sum over pairs")
    pairs = [
        RankedLogprobs(*(x[:, [i, j]] for x in (lists.policy, lists.reference, lists.lengths)))
        for i, j in itertools.combinations(range(4), 2)
    ]
    expected = sum(loss_of_lists(name, pair, stage).item() for pair in pairs) / 6
    assert loss_of_lists(name, lists, stage).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if loss.reference])
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=2), st.floats(-20, 20))
@settings(deadline=None, max_examples=30)
def test_a_shift_of_policy_and_reference_changes_nothing(name, logps, shift):
    policy, reference = torch.tensor([logps]), torch.tensor([[-1.0, -2.0]])
    lengths = torch.tensor([[3.0, 5.0]])
    stage = DpoConfig(loss=name, label_smoothing=0.1, loss_file=OWN)
    here = loss_of_lists(name, RankedLogprobs(policy, reference, lengths), stage)
    there = loss_of_lists(name, RankedLogprobs(policy + shift, reference + shift, lengths), stage)
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_by_hand(divergence):
    alpha, rho = 0.3, (1.0, -2.0)
    slope = {  # f'(u), u = exp(rho)
        "reverse_kl": lambda u: math.log(u) + 1,
        "forward_kl": lambda u: -1 / u,
        "jensen_shannon": lambda u: math.log(2 * u / (1 + u)),
        "alpha": lambda u: (1 - u**-alpha) / alpha,
    }[divergence]
    h = slope(math.exp(rho[0])) - slope(math.exp(rho[1]))
    stage = DpoConfig(divergence=divergence, divergence_alpha=alpha)
    found = loss_of_lists("sigmoid", EXAMPLE, stage).item()
    assert found == pytest.approx(-log_sigmoid(0.1 * h), rel=1e-5)


def test_extra_losses_and_nll_are_added_with_their_weights():
    stage = DpoConfig(extra_losses={"bco": 0.5}, nll_weight=2.0)
    expected = -log_sigmoid(0.3) + 0.5 * (-log_sigmoid(0.1) - log_sigmoid(0.2)) + 2.0 * 2.25
    assert objective(EXAMPLE, stage).item() == pytest.approx(expected, rel=1e-6)


def test_tokens_beyond_the_shortest_response_weigh_ld_alpha():
    logprobs = -torch.arange(1.0, 10.0)  # of responses of 2, 4 and 1, 2 tokens
    lengths = torch.tensor([[2, 4], [1, 2]])
    found = sequence_sums(logprobs, lengths, 0.5)
    assert found.tolist() == [[-3.0, -(3 + 4 + 0.5 * (5 + 6))], [-7.0, -(8 + 0.5 * 9)]]
    assert sequence_sums(logprobs, lengths, None).tolist() == [[-3.0, -18.0], [-7.0, -17.0]]


def minimum(loss, preferred: float, lengths=(1.0, 1.0)) -> tuple[float, float]:
    """The log-ratios of two responses, the first of which is preferred with that probability,
    where the expected loss is least; by float64 descent."""
    rho = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([lengths], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([rho], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        first = loss(RankedLogprobs(rho, torch.zeros_like(rho), tokens))
        second = loss(RankedLogprobs(rho.flip(1), torch.zeros_like(rho), tokens.flip(1)))
        total = (preferred * first + (1 - preferred) * second).sum()
        total.backward()
        return total

    optimizer.step(closure)
    first, second = rho[0].tolist()
    return first, second


def least_difference(loss, preferred: float, lengths=(1.0, 1.0)) -> float:
    """h = rho_1 - rho_2 there."""
    first, second = minimum(loss, preferred, lengths)
    return first - second


LOGIT = math.log(0.7 / 0.3)
FLIPPED = 0.7 * 0.9 + 0.3 * 0.1  # of P = 0.7, seen through labels that are wrong one time in ten
OPTIMA = {  # loss, its options, h at its minimum where the first is preferred with probability 0.7
    "sigmoid": ({}, 2 * LOGIT),  # (r_1 - r_2) / beta
    "sigmoid with smoothing": ({"label_smoothing": 0.1}, 2 * math.log(FLIPPED / (1 - FLIPPED))),
    "plackett_luce": ({}, 2 * LOGIT),
    "ipo": ({}, 0.4),  # (2 P - 1) / (2 tau)
    "ipo_sum": ({}, 0.4),
    "hinge": ({}, 2.0),  # deterministic: the margin 1 / beta
    "exo": ({"label_smoothing": 0.1}, 2 * 0.4 * math.log(9.0)),  # log q ~ P log .9 + (1 - P) log .1
    "nca": ({}, 2 * LOGIT),
    "bco": ({}, 2 * 2 * LOGIT),
    "sppo": ({}, 0.8),  # (2 P - 1) / beta
    "rdpo": ({}, 2 * LOGIT),  # of equal lengths
}


@pytest.mark.parametrize("case", OPTIMA)
def test_the_optimum_is_the_papers(case):
    name, (options, expected) = case.split()[0], OPTIMA[case]
    loss = LOSSES[name].compute
    h = least_difference(lambda logprobs: loss(logprobs, beta=0.5, **options), 0.7)
    assert h == pytest.approx(expected, abs=2e-3)


def test_rdpo_takes_the_length_out_of_the_log_ratio():
    """r = beta rho + penalty |y|: a longer response needs less of a log-ratio."""
    h = least_difference(lambda logprobs: rdpo_loss(logprobs, 0.5, 0.05), 0.7, (5.0, 1.0))
    assert h == pytest.approx((LOGIT - 0.05 * 4) / 0.5, abs=2e-3)


def test_robust_undoes_flipped_labels():
    """rDPO on labels that are flipped with probability e has the optimum of clean ones."""
    h = least_difference(lambda logprobs: robust_loss(logprobs, 0.5, 0.1), FLIPPED)
    assert h == pytest.approx(2 * LOGIT, abs=2e-3)


def test_forward_kl_has_its_own_optimum():
    """beta (f'(u_1) - f'(u_2)) = logit P, with f'(u) = -1/u."""
    stage = DpoConfig(divergence="forward_kl", beta=0.5)
    first, second = minimum(lambda logprobs: loss_of_lists("sigmoid", logprobs, stage), 0.7)
    assert 0.5 * (math.exp(-second) - math.exp(-first)) == pytest.approx(LOGIT, abs=2e-3)


SMOOTHING, GAMMA, TAU = 0.2, 0.5, 0.05
AGAINST_TRL = {
    "sigmoid": (sigmoid_loss, "sigmoid"),
    "hinge": (hinge_loss, "hinge"),
    "ipo": (ipo_loss, "ipo"),
    "sigmoid per token": (lambda x, b: sigmoid_loss(x, b, length_normalized=True), "sigmoid_norm"),
    "robust": (lambda x, b: robust_loss(x, b, SMOOTHING), "robust"),
    "exo": (lambda x, b: exo_loss(x, b, SMOOTHING), "exo_pair"),
    "nca": (nca_loss, "nca_pair"),
    "bco": (bco_loss, "bco_pair"),
    "sppo": (sppo_loss, "sppo_hard"),
    "aot": (lambda x, b: aot_loss(x, b, SMOOTHING), "aot"),
    "apo_zero": (apo_zero_loss, "apo_zero"),
    "apo_down": (apo_down_loss, "apo_down"),
    "discopop": (lambda x, b: discopop_loss(x, b, TAU), "discopop"),
}


@pytest.mark.parametrize("case", AGAINST_TRL)
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_agrees_with_trl(case, beta):
    agrees_with_trl(*AGAINST_TRL[case], beta)


@pytest.mark.parametrize(
    ("divergence", "theirs"),
    [("forward_kl", "forward_kl"), ("jensen_shannon", "js_divergence"),
     ("alpha", "alpha_divergence")],
)  # fmt: skip
def test_divergences_agree_with_trl(divergence, theirs):
    stage = DpoConfig(divergence=divergence, divergence_alpha=0.3, beta=0.5)
    agrees_with_trl(
        lambda x, b: loss_of_lists("sigmoid", x, stage), "sigmoid", 0.5,
        f_divergence_type=theirs, f_alpha_divergence_coef=0.7,  # theirs is one less ours
    )  # fmt: skip


def agrees_with_trl(ours, theirs, beta, **settings):
    """Value and gradient against TRL's `_compute_loss` fed random token log-probabilities through
    a stand-in model."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    torch.manual_seed(int(beta * 100))
    pairs, length = 6, 9
    response_lengths = torch.randint(1, length, (2 * pairs,))
    mask = (torch.arange(length + 1) > 0) & (torch.arange(length + 1) <= response_lengths[:, None])
    policy = (torch.randn(2 * pairs, length) * mask[:, 1:]).requires_grad_()
    reference = torch.randn(2 * pairs, length) * mask[:, 1:]
    loss = trl_loss(dpo_trainer, theirs, beta, policy, reference, mask.long(), **settings)
    inputs = RankedLogprobs(
        policy.sum(1).view(2, pairs).T, reference.sum(1).view(2, pairs).T,
        response_lengths.view(2, pairs).T.float(),
    )  # fmt: skip
    mine = ours(inputs, beta).mean()
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(loss, policy)
    (found,) = torch.autograd.grad(mine, policy)
    torch.testing.assert_close(found * mask[:, 1:], expected * mask[:, 1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["simpo", "cpo"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_reference_free_losses_agree_with_trl(kind, beta):
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    torch.manual_seed(3)
    logprobs = RankedLogprobs(-9 * torch.rand(6, 2) - 1, None, torch.randint(1, 9, (6, 2)).float())
    fields = SimpleNamespace(
        alpha=0.0, beta=beta, simpo_gamma=GAMMA, label_smoothing=SMOOTHING,
        loss_type={"cpo": "sigmoid"}.get(kind, kind), accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    given_theirs = logprobs.likelihoods if kind == "simpo" else logprobs.policy
    theirs = trainer.cpo_loss(fields, *given_theirs.unbind(1))[0]
    if kind == "simpo":
        ours = simpo_loss(logprobs, beta, GAMMA, SMOOTHING)
    else:  # theirs adds the NLL elsewhere
        ours = cpo_loss(logprobs, beta, SMOOTHING) + logprobs.likelihoods[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_orpo_agrees_with_trl():
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    torch.manual_seed(4)
    logprobs = RankedLogprobs(-9 * torch.rand(6, 2) - 1, None, torch.randint(1, 9, (6, 2)).float())
    fields = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    theirs = trainer.odds_ratio_loss(fields, *logprobs.likelihoods.unbind(1))[0]
    ours = orpo_loss(logprobs, 0.1) + logprobs.likelihoods[:, 0]  # without the NLL
    torch.testing.assert_close(ours, -theirs, rtol=1e-5, atol=1e-6)


class _Logs(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


def trl_loss(module, loss_type, beta, policy, reference, completion_mask, **settings):
    outputs = {
        "policy": SimpleNamespace(
            log_probs=policy, entropy=policy, mean_logits=policy, is_top1=policy > 0,
        ),
        "reference": SimpleNamespace(log_probs=reference),
    }  # fmt: skip
    trainer = SimpleNamespace(
        model=torch.nn.Identity(), accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False, precompute_ref_logps=False, beta=beta,
        ref_model=lambda **kwargs: outputs["reference"], loss_types=[loss_type],
        loss_weights=[1.0], use_weighting=False, label_smoothing=SMOOTHING,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=TAU),
        _metrics=_Logs(train=_Logs(), eval=_Logs()), _total_train_tokens=0, _tp_size=1,
        **{"ld_alpha": None, "f_divergence_type": "reverse_kl"} | settings,
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


def test_diagnostics_by_hand():
    pairs = ranked([[-9.0, -14.0], [-8.0, -6.0]], [[-10.0, -12.0], [-7.0, -6.0]])  # h = 3, -1
    found = {name: values.tolist() for name, values in diagnostics(pairs, beta=0.1)}
    assert found == {
        "logps/accuracies": [1.0, 0.0],
        "gradient_weight": pytest.approx([sigmoid(-0.3), sigmoid(0.1)], rel=1e-6),
        "logratios/chosen_fell": [0.0, 1.0],
    }


def test_length_correlation_is_pearsons():
    torch.manual_seed(0)
    pairs = RankedLogprobs(
        torch.randn(50, 2), torch.randn(50, 2), torch.randint(1, 30, (50, 2)).float()
    )
    means = {name: values.mean().item() for name, values in moments(pairs)}
    found = with_correlation(means | {"loss": 1.0})
    margin = pairs.logratios[:, 0] - pairs.logratios[:, 1]
    longer = pairs.lengths[:, 0] - pairs.lengths[:, 1]
    expected = torch.corrcoef(torch.stack([margin, longer]))[0, 1].item()
    assert found == {"loss": 1.0, CORRELATION: pytest.approx(expected, abs=1e-4)}


def test_no_correlation_where_lengths_are_equal():
    pairs = ranked([[-1.0, -2.0], [-3.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]], [[3.0, 3.0], [5.0, 5.0]])
    means = {name: values.mean().item() for name, values in moments(pairs)}
    assert with_correlation(means) == {}


def test_displacement_is_warned_of():
    assert warning({"logratios/chosen": -9.0}) is None
    assert warning({}) is None
    assert "12 nats less likely" in warning({"logratios/chosen": -12.3})
