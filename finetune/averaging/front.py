"""Two things that are wanted at once, and how good a method's choice between them is.

    hypervolume([(0.2, 0.7), (0.3, 0.5)], reference=(0.0, 0.0))      # 0.19

A point is (reward, ability), more is better of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]
RESAMPLES = 9999


def front(points: Sequence[Point]) -> list[Point]:
    """The points to which no other is better in one and as good in the other, by rising reward; none twice."""
    best: list[Point] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The area of all that some point is better than and the reference is worse than (Zitzler and Thiele 1999).

    A point that is no better than the reference in both adds nothing.
    """
    area, reached = 0.0, reference[1]
    for reward, ability in reversed(front(points)):
        if reward > reference[0] and ability > reached:
            area += (reward - reference[0]) * (ability - reached)
            reached = ability
    return area


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Of the mean of `values`, one from each seed: the percentile bootstrap (Efron 1979).

    Of three seeds it is as wide as the three values, for their resamples are few; one value has no interval, (nan,
    nan).
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(values, float),),
        np.mean,
        confidence_level=level,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=0,
    ).confidence_interval
    return float(found.low), float(found.high)
