"""Trustworthy maximization: make the kept part of a teacher's distribution as sure as it is right, then distil it.

    target = tempered(kept, temperatures, 1.4, vocabulary)
    fitted = fit(lambda strength: likelihood_loss(tempered(kept, temperatures, strength, vocabulary), labels), …)

FIRST (Shum et al., EMNLP 2024, arXiv:2408.12168) recalibrates a fine-tuned teacher's top tokens before it distils them.
Two ways are here, a temperature and a smoothing of the likeliest token; the strength of either is that which makes the
true answers of a validation set likeliest. Pure functions; N is positions, k the tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from finetune.distill.sparse import NUMBERS, Kept, tail_at

TEMPERATURE_RANGE = (0.25, 8.0)  # in which the fit looks
SMOOTHING_RANGE = (0.0, 0.5)
TOLERANCE = 1e-4


class Target(NamedTuple):
    """What a student is to say: natural logarithms of the kept tokens' probabilities and of all others' together.

    ids, log_q: (N, k). log_tail: (N,), or None where the kept tokens stand for all.
    """

    ids: torch.Tensor
    log_q: torch.Tensor
    log_tail: torch.Tensor | None


def plain(kept: Kept, temperatures: Sequence[float]) -> Target:
    """The teacher's own word. Raises `ValueError` for a tail that is not known at temperature 1."""
    if not temperatures:
        return Target(kept.ids, kept.logprobs, None)
    return Target(kept.ids, kept.logprobs, kept.tails[:, list(temperatures).index(1.0)])


def tempered(kept: Kept, temperatures: Sequence[float], temperature: float, vocabulary: int) -> Target:
    """softmax(ℓ / T) of the whole vocabulary's log-probabilities ℓ: the kept tokens, and the bucket of the others."""
    tail = tail_at(kept, temperatures, temperature, vocabulary)
    scaled = kept.logprobs / temperature
    total = torch.logaddexp(scaled.logsumexp(-1), tail)
    return Target(kept.ids, scaled - total[:, None], tail - total)


def smoothed(target: Target, share: float) -> Target:
    """The likeliest token gives `share` of its probability to the other kept ones, in equal parts; the tail stays.

    Where two are nearly as likely, the second may so become the first.
    """
    q = target.log_q.exp()
    likeliest = q.argmax(-1, keepdim=True)
    given = share * q.gather(-1, likeliest)
    q = (q + given / (q.shape[-1] - 1)).scatter(-1, likeliest, q.gather(-1, likeliest) - given)
    return target._replace(log_q=q.log())


def likelihood_loss(target: Target, labels: torch.Tensor) -> torch.Tensor:
    """(N,): −log of what the target gives to the true token of `labels` (N,), or to the others if it is one of them."""
    is_it = target.ids == labels[:, None]
    of_kept = torch.where(is_it, target.log_q, -torch.inf).logsumexp(-1)
    if target.log_tail is None:
        return -of_kept
    return -torch.where(is_it.any(-1), of_kept, target.log_tail)


def temperature_loss(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """(N,): the same of softmax(logits / T), (N, V): for a model whose whole vocabulary is at hand."""
    rows = max(1, NUMBERS // logits.shape[-1])
    parts = zip(logits.split(rows), labels.split(rows), strict=True)
    return torch.cat([cross_entropy(part.float() / temperature, true, reduction="none") for part, true in parts])


def fit(loss: Callable[[float], torch.Tensor], limits: tuple[float, float]) -> float:
    """The strength in `limits` whose loss (N,) has the least mean. Temperatures are looked for by their logarithm."""
    low, high = limits
    if low > 0:
        found = minimize_scalar(
            lambda x: float(loss(float(np.exp(x))).mean()),
            bounds=(np.log(low), np.log(high)),
            method="bounded",
            options={"xatol": TOLERANCE},
        )
        return float(np.exp(found.x))
    found = minimize_scalar(
        lambda x: float(loss(float(x)).mean()), bounds=limits, method="bounded", options={"xatol": TOLERANCE}
    )
    return float(found.x)


def first_choices(target: Target, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """((N,) probabilities of the likeliest tokens, (N,) whether those are the true ones): for a reliability diagram."""
    confidence, place = target.log_q.exp().max(-1)
    right = target.ids.gather(-1, place[:, None])[:, 0] == labels
    return confidence.numpy(), right.numpy()
