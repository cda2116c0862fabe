"""How far confidences can be trusted: pure functions from confidences and what came true to numbers, and to curves.

    confidences: (N,) in [0, 1], what was said to be right with that probability.
    correct: (N,) bools, whether it was.

Anything that is right or wrong will do: a named target, a box, the token of an answer. A number of nothing is None.
All are a few lines of numpy, so there is no need of torchmetrics, against whose ECE the tests check where it is
installed; it has neither bins of equal counts nor risk and coverage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Confidences: TypeAlias = Sequence[float] | np.ndarray
Correct: TypeAlias = Sequence[bool] | np.ndarray

SMALLEST = 1e-7  # of a probability in a logarithm: one wrong certainty should cost much, not everything


def summary(confidences: Confidences, correct: Correct) -> dict[str, float | None]:
    """The numbers of this module by name.

    n, accuracy, confidence: how many there are, how many of them are right, and how many should be.
    ece_10, ece_15, ece_adaptive: calibration error over 10 and 15 equal bins, and 15 bins of equal counts.
    nll, brier: what a probability costs by its logarithm, and by its square.
    trust: accuracy - ece_10. Not a measure of the literature but ours: one number that falls with either.
    aurc: mean risk over all coverages.
    risk_80: share of wrong ones where the least sure fifth is left out.
    """
    n = len(confidences)
    if not n:
        return {"n": 0, **dict.fromkeys(NUMBERS)}
    accuracy = float(np.mean(correct))
    ece = expected_calibration_error(confidences, correct)
    return {
        "n": n,
        "accuracy": accuracy,
        "confidence": float(np.mean(confidences)),
        "ece_10": ece,
        "ece_15": expected_calibration_error(confidences, correct, bins=15),
        "ece_adaptive": adaptive_calibration_error(confidences, correct),
        "nll": negative_log_likelihood(confidences, correct),
        "brier": brier_score(confidences, correct),
        "trust": None if ece is None else accuracy - ece,
        "aurc": float(risk_coverage(confidences, correct)[1].mean()),
        "risk_80": risk_at(confidences, correct, coverage=0.8),
    }


NUMBERS = (
    *("accuracy", "confidence", "ece_10", "ece_15", "ece_adaptive"),
    *("nll", "brier", "trust", "aurc", "risk_80"),
)


def expected_calibration_error(confidences: Confidences, correct: Correct, bins: int = 10) -> float | None:
    """Mean distance of confidence and accuracy over `bins` equal bins of [0, 1], weighted by their counts
    (Naeini et al. 2015)."""
    if not len(confidences):
        return None
    return _weighted_gap(calibration_bins(confidences, correct, bins))


def adaptive_calibration_error(confidences: Confidences, correct: Correct, bins: int = 15) -> float | None:
    """The same over `bins` bins that hold equally many (Nguyen and O'Connor 2015); equal confidences share a bin."""
    if not len(confidences):
        return None
    confidence = np.asarray(confidences, np.float64)
    edges = np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1])
    return _weighted_gap(_counted(np.searchsorted(edges, confidence, side="right"), confidence, correct, bins))


Bins: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


def calibration_bins(confidences: Confidences, correct: Correct, bins: int = 10) -> Bins:
    """(counts, sums of confidence, numbers of correct ones), each (bins,), over equal bins of [0, 1]."""
    confidence = np.asarray(confidences, np.float64)
    return _counted(np.minimum((confidence * bins).astype(int), bins - 1), confidence, correct, bins)


def _counted(index: np.ndarray, confidence: np.ndarray, correct: Correct, bins: int) -> Bins:
    hit = np.asarray(correct, np.float64)
    counts, confidence_sums, hits = (np.bincount(index, weights, bins) for weights in (None, confidence, hit))
    return counts, confidence_sums, hits


def _weighted_gap(binned: Bins) -> float:
    counts, confidence, hit = binned
    return float(np.abs(confidence - hit).sum() / counts.sum())


def negative_log_likelihood(confidences: Confidences, correct: Correct) -> float | None:
    """Mean -log of the probability that was given to what came true, in nats."""
    if not len(confidences):
        return None
    confidence = np.clip(np.asarray(confidences, np.float64), SMALLEST, 1 - SMALLEST)
    return float(-np.log(np.where(correct, confidence, 1 - confidence)).mean())


def brier_score(confidences: Confidences, correct: Correct) -> float | None:
    """Mean squared distance of confidence and truth, in [0, 1] (Brier 1950)."""
    if not len(confidences):
        return None
    return float(np.square(np.asarray(confidences, np.float64) - np.asarray(correct, np.float64)).mean())


def risk_coverage(confidences: Confidences, correct: Correct) -> tuple[np.ndarray, np.ndarray]:
    """(coverage, risk), each (N,): the share of answers that are given when the surest come first, and the share of
    wrong ones among them (El-Yaniv and Wiener 2010). Equally sure ones come in no order: each counts as their mean."""
    if not len(confidences):
        return np.empty(0), np.empty(0)
    confidence, wrong = np.asarray(confidences, np.float64), 1 - np.asarray(correct, np.float64)
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    surest_first = np.repeat(np.bincount(group, wrong) / sizes, sizes)
    given = np.arange(1, len(wrong) + 1)
    return given / len(wrong), np.cumsum(surest_first) / given


def risk_at(confidences: Confidences, correct: Correct, coverage: float) -> float | None:
    """The share of wrong ones among the surest `coverage` of all; at least one answer is given."""
    if not len(confidences):
        return None
    _, risk = risk_coverage(confidences, correct)
    return float(risk[max(round(coverage * len(risk)), 1) - 1])
