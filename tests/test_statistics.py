"""Statistics against numbers worked by hand."""

import math

import pytest

from dpo_cli.evaluation.statistics import Bin, calibration_error, reliability


def test_calibration_by_hand():
    """log-odds of 3/4 and 9/10: two right of three at .75, one right of one at .9, one tie."""
    low, high = math.log(3), math.log(9)
    bins = reliability([low, low, -low, high, 0.0])
    assert [b.count for b in bins] == [1, 3, 1]
    assert [b.confidence for b in bins] == pytest.approx([0.5, 0.75, 0.9])
    assert [b.accuracy for b in bins] == pytest.approx([0.5, 2 / 3, 1.0])
    expected = (3 * (0.75 - 2 / 3) + 1 * 0.1) / 5
    assert calibration_error(bins) == pytest.approx(expected)


def test_calibrated_predictions_have_no_error():
    """Of n pairs at log-odds z, a share sigmoid(z) is right."""
    margins = (
        [math.log(4)] * 80 + [-math.log(4)] * 20 + [math.log(1.5)] * 60 + [-math.log(1.5)] * 40
    )
    assert calibration_error(reliability(margins)) == pytest.approx(0.0, abs=1e-12)
    sure = reliability([800.0, -800.0])  # no overflow
    assert sure == [Bin(1.0, 0.5, 2)]
