"""Concentrated knowledge: how much of a teacher's distribution lies in how few tokens (FIRST, section 3).

{"tokens": 70123, "mass": [0.93, …], "share": [0.81, …]}, for the likeliest 1 to 10 tokens: the mean of their mass, and
the share of positions at which they have ENOUGH of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

MOST = 10  # tokens
ENOUGH = 0.95


def counted(likeliest: torch.Tensor) -> np.ndarray:
    """(2, MOST) sums over N positions: of the mass in the likeliest 1 to MOST tokens, and of positions at which that is
    ENOUGH; NaN from where no more tokens are known.

    likeliest: (N, any number), log-probabilities in falling order.
    """
    mass = likeliest[:, :MOST].double().exp().cumsum(-1)
    sums = torch.stack([mass.sum(0), (mass >= ENOUGH).double().sum(0)])
    return torch.nn.functional.pad(sums, (0, MOST - mass.shape[-1]), value=torch.nan).numpy()


def summary(sums: np.ndarray, tokens: int) -> dict[str, Any]:
    """Of the added-up results of `counted` over so many positions; as far as they are known."""
    mass, share = (sums[:, np.isfinite(sums[0])] / tokens).tolist()
    return {"tokens": tokens, "mass": mass, "share": share}
