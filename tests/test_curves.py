"""What metrics.jsonl comes to."""

import json
import math

import pytest

from dpo_cli.report.curves import training_figures


def test_first_and_last_figures(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "eval/loss": 0.7}]
    rows += [{"step": s, "loss": 1.0 / s, "lr": 0.1} for s in range(1, 21)]
    rows += [{"step": 20, "eval/loss": 0.4}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    figures = training_figures(path)
    assert figures["first/loss"] == 1.0
    assert figures["loss"] == pytest.approx((1 / 19 + 1 / 20) / 2)  # the last tenth
    assert (figures["first/eval/loss"], figures["eval/loss"]) == (0.7, 0.4)
    assert "first/lr" not in figures


def test_nothing_logged_and_nothing_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert training_figures(path) == {}
    path.write_text('{"step": 1, "loss": null}\n')
    assert math.isnan(training_figures(path)["loss"])
