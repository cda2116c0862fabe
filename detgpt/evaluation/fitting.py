"""Fit what `detgpt.calibration` applies, by SciPy: from confidences and what came true to a rising curve.

temperature   one number (Guo et al. 2017): enough where a model is too sure, or not sure enough, everywhere alike
logistic      and a shift (Platt 1999)
isotonic      any rising curve, for some thousand claims (Zadrozny and Elkan 2002), from block centre to block
              centre (Oron and Flournoy 2017), so that what was surer stays surer and is not only not less sure
best          the one of them with the least cross-validated log-loss
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from detgpt.calibration import Curve, Isotonic, Logistic, logit
from detgpt.errors import InputError
from detgpt.evaluation.calibration import negative_log_likelihood
from detgpt.evaluation.judging import Judged
from detgpt.evaluation.metrics import load_extra

BEST = "best"
FOLDS = 5
GROUP = 20  # claims of like confidence that are one point of an isotonic curve; a single one would be its end
FEWEST = 10  # right ones, and wrong ones; from fewer a curve would be made up


def fit(judged: Judged, method: str = BEST) -> Curve:
    """The curve of `method` that makes the confidences into shares of right ones.

    Raises `InputError` for an unknown method and where there is not `enough`, `MissingExtraError` without SciPy.
    """
    if method != BEST and method not in METHODS:
        raise InputError(f"method={method!r} is unknown: choose one of {', '.join([*METHODS, BEST])}")
    if not enough(judged):
        right, wrong = judged.rights_and_wrongs
        raise InputError(
            f"{right} right and {wrong} wrong claims about {len(set(judged.pictures))} pictures are too few to fit on: "
            f"label more, for {FEWEST} of each about {FOLDS} pictures"
        )
    return _fitted(judged, method)


def enough(judged: Judged) -> bool:
    """Whether there are `FEWEST` right and wrong claims, and pictures for every fold."""
    return min(judged.rights_and_wrongs) >= FEWEST and len(set(judged.pictures)) >= FOLDS


def cross_validated(judged: Judged, method: str = BEST) -> np.ndarray:
    """Each claim's confidence (N,) by a curve that was fitted on other pictures: what to expect on new ones."""
    calibrated = np.empty(len(judged.confidences))
    for fold in range(FOLDS):
        out = judged.pictures % FOLDS == fold
        inside = Judged(*(column[~out] for column in judged))
        calibrated[out] = _fitted(inside, method)(judged.confidences[out])
    return calibrated


def _fitted(judged: Judged, method: str) -> Curve:
    if method == BEST:
        method = min(METHODS, key=lambda name: _log_loss(cross_validated(judged, name), judged.correct))
    return METHODS[method](judged.confidences, _smoothed(judged.correct))


def _log_loss(confidences: np.ndarray, correct: np.ndarray) -> float:
    return negative_log_likelihood(confidences, correct) or 0.0


def _smoothed(correct: np.ndarray) -> np.ndarray:
    """What to aim at (N,): not quite 1 and 0, as if one more of each kind had been seen the other way (Platt 1999)."""
    right, wrong = correct.sum(), (~correct).sum()
    return np.where(correct, (right + 1) / (right + 2), 1 / (wrong + 2))


def _fit_logistic(confidences: np.ndarray, aims: np.ndarray, shift: bool = True) -> Logistic:
    odds = logit(confidences)

    def loss(settings: np.ndarray) -> float:
        scaled = odds * np.exp(settings[0]) + (settings[1] if shift else 0)
        return float(np.mean(np.logaddexp(0, scaled) - aims * scaled))

    start = np.zeros(2 if shift else 1)
    bounds = [(-7, 7)] * len(start)  # confidences that say nothing would go on for ever
    slope, *bias = load_extra("scipy.optimize").minimize(loss, start, method="L-BFGS-B", bounds=bounds).x
    return Logistic(temperature=float(np.exp(-slope)), bias=float(bias[0]) if shift else 0.0)


def _fit_temperature(confidences: np.ndarray, aims: np.ndarray) -> Logistic:
    return _fit_logistic(confidences, aims, shift=False)


def _fit_isotonic(confidences: np.ndarray, aims: np.ndarray) -> Isotonic:
    edges = np.quantile(confidences, np.linspace(0, 1, max(len(confidences) // GROUP, 1) + 1)[1:-1])
    _, group, counts = np.unique(np.searchsorted(edges, confidences), return_inverse=True, return_counts=True)
    centres, means = (np.bincount(group, values) / counts for values in (confidences, aims))
    pooled = load_extra("scipy.optimize").isotonic_regression(means, weights=counts)
    starts = np.flatnonzero(np.diff(pooled.x, prepend=-1) > 1e-9)  # blocks may be equal
    knots = np.add.reduceat(centres * counts, starts) / np.add.reduceat(counts, starts)
    return Isotonic(tuple(knots.tolist()), tuple(pooled.x[starts].tolist()))


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Curve]] = {
    "temperature": _fit_temperature,
    "logistic": _fit_logistic,
    "isotonic": _fit_isotonic,
}
