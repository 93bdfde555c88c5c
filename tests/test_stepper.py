"""Steps of static shape against the dynamic path and the plain forward, on a CPU; on CUDA,
recorded against not recorded."""

from __future__ import annotations

import pytest

from dpo_cli.model import generate, static_cache, stepper
from dpo_cli.model.generate import SamplingOptions
from dpo_cli.model.stepper import Stepper, can_step
from small_models import FAMILIES, compute_in_float64
from test_generate import (
    STEPS,
    assert_the_plain_forwards,
    ready,
    sample_until_a_common_token,
)


@pytest.fixture
def static(monkeypatch):
    """The static steps on a CPU, with buffers that grow and rows that drop out early."""
    monkeypatch.setitem(generate.STATIC, "cpu", True)
    monkeypatch.setattr(static_cache, "FIRST_OWN", 4)
    monkeypatch.setattr(static_cache, "LEAST_ROWS", 1)
    monkeypatch.setattr(stepper, "LOOK_EVERY", 2)


def refuse(line):
    raise AssertionError(line)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("completions", [1, 4])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gptj", "mixtral")])
def test_static_steps_are_exact(family, completions, temperature, monkeypatch, static):
    compute_in_float64(monkeypatch)
    model = ready(family)
    assert can_step(model, refuse)
    shapes = seen_shapes(monkeypatch)
    options = SamplingOptions(completions, temperature, max_new_tokens=STEPS)
    rows, eos = sample_until_a_common_token(model, options)
    assert len({len(c.ids) for row in rows for c in row}) > 1
    assert all(c.finished == (c.ids[-1] == eos) for row in rows for c in row)
    assert len(shapes) > 1
    assert_the_plain_forwards(model, rows, greedy=temperature == 0.0)


def seen_shapes(monkeypatch):
    shapes = set()
    step = Stepper._step

    def noted(self):
        shapes.add(self.cache.shape)
        step(self)

    monkeypatch.setattr(Stepper, "_step", noted)
    return shapes
