"""What the numbers about confidences mean, against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from detgpt.evaluation.calibration import (
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    risk_at,
    risk_coverage,
    summary,
)

UNDEFINED = None


@pytest.mark.parametrize(
    ("confidences", "correct", "error"),
    [
        ([], [], UNDEFINED),
        ([1.0, 1.0], [True, True], 0.0),
        ([0.9, 0.9], [True, False], 0.4),
        ([0.1, 0.95], [True, False], (0.9 + 0.95) / 2),  # two bins, equally full
        ([1.0, 0.95], [False, True], 0.475),  # certainty is of the last bin
        ([0.62, 0.68], [True, False], 0.15),  # one bin: mean confidence 0.65, accuracy 0.5
        ([0.0, 0.6, 0.6, 0.6], [False, True, True, False], 3 / 4 * (2 / 3 - 0.6)),
    ],
)
def test_calibration_error(confidences: list[float], correct: list[bool], error: float | None):
    assert expected_calibration_error(confidences, correct) == (error if error is None else pytest.approx(error))


def test_more_bins_see_what_fewer_average_out():
    """0.62 and 0.68 are one bin of ten, and two of fifteen: 0.60 to 0.67, 0.67 to 0.73."""
    assert expected_calibration_error([0.62, 0.68], [True, False], bins=15) == pytest.approx((0.38 + 0.68) / 2)


def test_adaptive_bins_hold_equally_many():
    """All lie in one equal bin; two bins of three each see that the surer three are right and the others wrong."""
    confidences, correct = [0.91, 0.92, 0.93, 0.94, 0.95, 0.96], [False] * 3 + [True] * 3
    assert expected_calibration_error(confidences, correct) == pytest.approx(0.935 - 0.5)
    assert adaptive_calibration_error(confidences, correct, bins=2) == pytest.approx((0.92 + 0.05) / 2)


def test_equal_confidences_share_a_bin_in_whatever_order_they_come():
    confidences, correct = [0.8] * 10, [True] * 8 + [False] * 2
    assert adaptive_calibration_error(confidences, correct) == pytest.approx(0)
    assert adaptive_calibration_error(confidences, correct[::-1]) == pytest.approx(0)


def test_likelihood_and_brier_score():
    confidences, correct = [0.8, 0.4], [True, False]
    assert negative_log_likelihood(confidences, correct) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)
    assert brier_score(confidences, correct) == pytest.approx((0.2**2 + 0.4**2) / 2)
    assert negative_log_likelihood([], []) is brier_score([], []) is UNDEFINED


def test_a_wrong_certainty_costs_much_but_not_everything():
    assert 10 < (negative_log_likelihood([1.0], [False]) or 0) < 20


def test_risk_is_that_of_the_surest_answers():
    coverage, risk = risk_coverage([0.2, 0.9, 0.6, 0.8], [False, True, True, False])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])  # 0.9 right, 0.8 wrong, 0.6 right, 0.2 wrong
    assert risk_at([0.2, 0.9, 0.6, 0.8], [False, True, True, False], coverage=0.75) == pytest.approx(1 / 3)
    assert risk_at([0.9], [True], coverage=0.1) == 0
    assert risk_at([], [], coverage=0.8) is UNDEFINED


def test_equally_sure_answers_come_in_no_order():
    _, risk = risk_coverage([0.5] * 4, [True, False, True, False])
    assert risk.tolist() == pytest.approx([0.5] * 4)


def test_the_summary_of_what_is_as_sure_as_it_is_right():
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0, 1, 20_000)
    numbers = summary(confidences, rng.uniform(0, 1, 20_000) < confidences)
    assert numbers["n"] == 20_000
    for error in ("ece_10", "ece_15", "ece_adaptive"):
        assert 0 < (numbers[error] or 0) < 0.015
    assert numbers["brier"] == pytest.approx(1 / 6, abs=0.01)  # the integral of p (1 - p)
    assert numbers["nll"] == pytest.approx(1 / 2, abs=0.01)  # and of the entropy
    assert numbers["trust"] == pytest.approx((numbers["accuracy"] or 0) - (numbers["ece_10"] or 0))
    assert numbers["risk_80"] == pytest.approx(0.4, abs=0.02)  # those over 0.2 are right 60% of the time
    assert numbers["aurc"] == pytest.approx(1 / 4, abs=0.02)


def test_of_nothing_there_is_no_number():
    numbers = summary([], [])
    assert numbers.pop("n") == 0
    assert set(numbers) == set(summary([0.5], [True])) - {"n"}
    assert set(numbers.values()) == {UNDEFINED}
