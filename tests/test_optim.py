"""Schedules by hand; one step against torch's own clipping; every optimiser learns."""

import pytest
import torch

from dpo_cli.config import OptimConfig
from dpo_cli.errors import NonFiniteError
from dpo_cli.train.optim import build_optimizer, learning_rate, take_step


def rates(total=10, **options):
    config = OptimConfig(**options)
    return [learning_rate(config, 1.0, s, total) for s in range(total)]


def test_constant_after_linear_warmup():
    assert rates(warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])
    assert rates(warmup_ratio=0.2)[:3] == pytest.approx([0.5, 1.0, 1.0])


def test_linear_and_cosine_decay():
    assert rates(schedule="linear", warmup_steps=2)[2:] == pytest.approx(
        [1 - i / 8 for i in range(8)]
    )
    cosine = rates(schedule="cosine", warmup_steps=2)
    assert cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.5)


def linear_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def loss_sum(model, rows):
    return (model(rows) ** 2).sum()


@pytest.mark.parametrize("max_norm", [0.1, 100.0, 0.0])
def test_step_equals_torch_on_the_mean(max_norm):
    rows, weight = torch.randn(6, 3), 6.0
    ours, theirs = linear_model(), linear_model()
    config = OptimConfig(max_grad_norm=max_norm)
    loss_sum(ours, rows).backward()
    norm = take_step(ours, build_optimizer(ours, config, 0.1), weight, max_norm, 0.1)
    (loss_sum(theirs, rows) / weight).backward()
    limit = max_norm or float("inf")
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.0).step()
    assert norm == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_non_finite_gradient_changes_nothing():
    model = linear_model()
    before = [p.clone() for p in model.parameters()]
    (model(torch.ones(1, 3)).sum() * float("nan")).backward()
    with pytest.raises(NonFiniteError, match="gradient norm"):
        take_step(model, build_optimizer(model, OptimConfig(), 0.1), 1.0, 1.0, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_weight_decay_spares_biases():
    groups = build_optimizer(linear_model(), OptimConfig(weight_decay=0.1), 0.1).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 1), (0.0, 1)]


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adamw8bit"])
def test_every_optimiser_learns(name):
    def run(optimizer, model, steps):
        for _ in range(steps):
            loss = loss_sum(model, rows)
            loss.backward()
            take_step(model, optimizer, 8.0, 1.0, 0.001)
        return loss.item()

    torch.manual_seed(1)
    rows, model = torch.randn(8, 300), torch.nn.Linear(300, 32)  # large enough for 8-bit state
    optimizer = build_optimizer(model, OptimConfig(name=name), 0.001)
    first = run(optimizer, model, 1)
    assert run(optimizer, model, 15) < 0.8 * first
