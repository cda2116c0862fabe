"""What a student loses against a teacher: the Kullback-Leibler divergence KL(q ‖ s), position by position.

    sparse_kl(student_logits, ids, log_q, log_tail)       # q on a few tokens, and on all others together
    sparse_kl(student_logits, ids, log_q)                 # q on a few tokens that stand for all (random sampling)
    dense_kl(student_logits, teacher_logits)              # q on the whole vocabulary

Pure functions, tensors in and tensors out; N is positions, V the vocabulary, k the tokens that are kept. The student's
probabilities are always those of its whole vocabulary: renormalised over k tokens it could put mass on any other
without a loss.
"""

from __future__ import annotations

import torch


def sparse_kl(
    logits: torch.Tensor, ids: torch.Tensor, log_q: torch.Tensor, log_tail: torch.Tensor | None = None
) -> torch.Tensor:
    """(N,): Σ q (log q − log s) over the kept tokens and, with `log_tail`, over the bucket of all others.

    logits: (N, V), the student's. ids: (N, k). log_q: (N, k), natural logarithms; a token with -inf counts nothing.
    log_tail: (N,), the logarithm of what q gives to all tokens that are not kept; None: nothing.
    """
    logits = logits.float()
    total = logits.logsumexp(-1)
    lost = _terms(log_q, logits.gather(-1, ids) - total[:, None]).sum(-1)
    if log_tail is None or ids.shape[-1] == logits.shape[-1]:
        return lost
    # Of the tail itself: 1 − Σ s would be all rounding where the kept tokens have nearly everything.
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return lost + _terms(log_tail, rest - total)


def dense_kl(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """(N,): KL of softmax(teacher_logits) and softmax(logits), both (N, V)."""
    log_q, log_s = teacher_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return _terms(log_q, log_s).sum(-1)


def _terms(log_q: torch.Tensor, log_s: torch.Tensor) -> torch.Tensor:
    """q (log q − log s), 0 where q is."""
    log_q = log_q.to(log_s.dtype)
    is_nothing = log_q == -torch.inf
    return torch.where(is_nothing, 0.0, log_q.exp() * (log_q.masked_fill(is_nothing, 0.0) - log_s))
