"""What is kept of a teacher's distribution: a few of its tokens, and what is left to all the others.

    kept = top(logits, 5, temperatures=(1.0, 2.0))        # FIRST: the likeliest tokens
    kept = drawn(logits, 5, chance)                       # random sampling: tokens as the teacher would say them

All functions are pure, tensors in and tensors out; N is positions, V the vocabulary, k the tokens that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

NUMBERS = 1 << 26  # of logits that are worked on at a time, where there may be many
# The default: 1 is the distribution itself; with 2 the tail is known well enough at any other (`tail_at`).
TEMPERATURES = (1.0, 2.0)


class Kept(NamedTuple):
    """What is kept of N distributions.

    ids: (N, k) tokens. logprobs: (N, k), the natural logarithms of what the loss takes them for, the likeliest first; a
    token with -inf counts nothing. tails: (N, temperatures), of the tokens that are not kept: log Σ exp(ℓ / T), where ℓ
    are their log-probabilities; without columns where nothing is left to them.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    tails: torch.Tensor


def top(logits: torch.Tensor, k: int, temperatures: Sequence[float] = TEMPERATURES) -> Kept:
    """The `k` likeliest tokens of `logits` (N, V), and the tail at each temperature.

    The full vocabulary's log-sum-exp at a temperature is that of `logprobs / T` and the tail. The tail by itself is
    what is kept: where k tokens have nearly all of the mass, half precision would lose it in the sum.
    """
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    likeliest, ids = logits.topk(k)
    rest = logits.scatter(-1, ids, -torch.inf)
    tails = [(rest if t == 1 else rest / t).logsumexp(-1) - total[:, 0] / t for t in temperatures]
    return Kept(ids, likeliest - total, torch.stack(tails, dim=-1) if tails else likeliest.new_empty(len(likeliest), 0))


def narrowed(kept: Kept, k: int, temperatures: Sequence[float]) -> Kept:
    """Of what `top` kept the `k` likeliest tokens; the others go into the tail."""
    others = kept.logprobs[:, k:, None] / kept.tails.new_tensor(temperatures)  # (N, others, temperatures)
    return Kept(kept.ids[:, :k], kept.logprobs[:, :k], torch.logaddexp(kept.tails, others.logsumexp(1)))


def drawn(logits: torch.Tensor, k: int, chance: torch.Generator) -> Kept:
    """`k` draws from softmax(logits), each token weighed by how often it came: Random Sampling Knowledge Distillation
    (Anshumann et al., ACL 2025, arXiv:2503.16870) with the teacher itself as proposal.

    The weights are an unbiased estimate of the whole distribution, and so are the gradients of a loss that is linear in
    it. A token that came twice stands there twice, the second time with -inf.
    """
    draws = torch.multinomial(logits.float().softmax(-1), k, replacement=True, generator=chance)  # (N, k)
    same = draws[:, :, None] == draws[:, None, :]
    is_first = ~same.tril(-1).any(-1)
    weights = same.sum(-1) / k
    weights, order = torch.where(is_first, weights, 0.0).sort(dim=-1, descending=True, stable=True)
    return Kept(draws.gather(-1, order), weights.log(), weights.new_empty(len(draws), 0))


def tail_at(kept: Kept, temperatures: Sequence[float], temperature: float, vocabulary: int) -> torch.Tensor:
    """(N,): the tail's log Σ exp(ℓ / T) at any temperature T, from those at `temperatures`.

    As a function of 1/T it is smooth and convex, and known at 0, where each token counts 1. Between, the polynomial
    through the known points is taken; beyond the lowest known temperature, where the tail has next to nothing, the line
    through the last two of them, which is never too high. Raises `ValueError` where no temperature is known.
    """
    if not temperatures:
        raise ValueError("nothing is known of the tail")
    known = {0.0: kept.tails.new_full((len(kept.tails),), math.log(max(vocabulary - kept.ids.shape[-1], 1)))}
    known |= {1 / t: kept.tails[:, i] for i, t in enumerate(temperatures)}
    at = 1 / temperature
    places = sorted(known)
    if at in known:
        return known[at]
    if at > places[-1]:
        places = places[-2:]
    shares = [math.prod((at - other) / (place - other) for other in places if other != place) for place in places]
    return torch.stack([share * known[place] for place, share in zip(places, shares, strict=True)]).sum(0)
