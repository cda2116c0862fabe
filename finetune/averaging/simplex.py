"""Ratios with a fixed mean, each from 0 to 1: the points among which Heterogeneous Model Averaging chooses.

The paper's own mapping (Lin et al. 2024, arXiv:2309.06256, Eq. 11) makes ratios beyond 1, and nears the ends of their
range without reaching them. Here ratios themselves are learned, and what leaves the range is projected onto it.
"""

from __future__ import annotations

from itertools import product

import torch

HALVINGS = 64  # of an interval: down to what a double can tell apart


def project(values: torch.Tensor, mean: float, epsilon: float = 0.0) -> torch.Tensor:
    """The ratios nearest to `values`, (K,) in float64, that have `mean` as their mean and are within `limits`.

    All values are moved by as much and then clipped, where the move is the one that gives the mean (Wang & Lu 2015,
    arXiv:1503.01002). It is found by halving.
    """
    least, greatest = limits(len(values), mean, epsilon)
    low, high = least - values.max(), greatest - values.min()
    for _ in range(HALVINGS):
        move = (low + high) / 2
        if (values + move).clamp(least, greatest).mean() < mean:
            low = move
        else:
            high = move
    return (values + high).clamp(least, greatest)


def limits(groups: int, mean: float, epsilon: float) -> tuple[float, float]:
    """The least and the greatest ratio: those that Eq. 11 of the paper gives with this epsilon, but no more than 1.

    Without epsilon the least is 0; the larger it is, the nearer all ratios are to the mean.
    """
    least = epsilon / (epsilon + (groups - 1) * (1 + epsilon)) if groups > 1 else 1.0
    greatest = (1 + epsilon) / (1 + epsilon + (groups - 1) * epsilon)
    total = mean * groups
    return total * least, min(1.0, total * greatest)


def grid(groups: int, mean: float, points: int) -> list[tuple[float, ...]]:
    """Ratios all over the capped simplex: `points` values of each ratio but the last, which makes up for the mean."""
    total = mean * groups
    values = [min(1.0, total) * i / (points - 1) for i in range(points)]
    chosen = ((*first, total - sum(first)) for first in product(values, repeat=groups - 1))
    return [(*ratios[:-1], min(max(ratios[-1], 0.0), 1.0)) for ratios in chosen if -1e-9 <= ratios[-1] <= 1 + 1e-9]
