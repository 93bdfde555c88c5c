"""Statistics against numbers worked by hand."""

import math

import pytest

from dpo_cli.statistics import (
    Bin,
    calibration_error,
    clustered_mean,
    mean_and_error,
    reliability,
    win_rate,
)


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


def test_wilson_intervals_by_hand():
    """60 of 100, and the closed forms at the ends: z^2 / (n + z^2)."""
    found = win_rate(60, 40, 0)
    assert (found.value, found.low, found.high) == pytest.approx((0.6, 0.5020026, 0.6905987))
    z2 = 1.959963984540054**2
    none, all_ = win_rate(0, 10, 0), win_rate(10, 0, 0)
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, z2 / (10 + z2)))
    assert (all_.value, all_.low, all_.high) == pytest.approx((1, 10 / (10 + z2), 1))


@pytest.mark.parametrize(("wins", "losses", "ties"), [(7, 2, 0), (3, 1, 5), (0, 0, 4), (1, 0, 0)])
def test_an_interval_ends_where_the_score_test_rejects(wins, losses, ties):
    """|found - p| = z sqrt(p (1 - p) / n) at both ends p; ties are half wins."""
    found, n = win_rate(wins, losses, ties), wins + losses + ties
    assert found.value == (2 * wins + ties) / (2 * n)
    for p in (found.low, found.high):
        deviation = 1.959963984540054 * math.sqrt(p * (1 - p) / n)
        assert abs(found.value - p) == pytest.approx(deviation, abs=1e-9)


def test_without_a_match_there_is_no_rate():
    found = win_rate(0, 0, 0)
    assert all(math.isnan(value) for value in (found.value, found.low, found.high))


def test_the_error_of_pairs_that_share_prompts_by_hand():
    """Deviations from .5 of a, a, b, b: +.5 +.5 and -.5 -.5, so sqrt(2/1 (1 + 1)) / 4 = .5."""
    assert clustered_mean([1.0, 1.0, 0.0, 0.0], "aabb") == (0.5, pytest.approx(0.5))
    assert clustered_mean([1.0, 1.0, 0.0, 0.0], "abab") == (0.5, 0.0)
    values = [1.0, 0.0, 0.5, 1.0, 1.0]
    assert clustered_mean(values, range(5)) == pytest.approx(mean_and_error(values))
    mean, error = clustered_mean([1.0, 0.0], "aa")
    assert mean == 0.5
    assert math.isnan(error)
