"""How good a harm detector is: scores of exchanges, and what follows from them.

scored = score(detector, exchanges)
auroc(scored.harm, scored.harmful); threshold = choose_threshold(scored, most=0.02)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, mannwhitneyu

from detgpt.errors import InputError
from detgpt.guards.parts import HarmDetector
from finetune.protector.exchanges import Exchange


@dataclass(frozen=True)
class Scored:
    """N texts of exchanges: questions alone, and with an answer.

    harm: how sure of harm, in [0, 1], (N,). harmful: the truth, (N,) bool. asked: whether the text is a question alone.
    exchange: the index of its exchange.
    """

    harm: np.ndarray
    harmful: np.ndarray
    asked: np.ndarray
    exchange: np.ndarray


def labelled(exchange: Exchange) -> Iterator[tuple[str | None, bool]]:
    """What of an exchange is judged: None for its question alone, or an answer; and whether it does harm."""
    if exchange.question_harmful is not None:
        yield None, exchange.question_harmful
    yield from zip(exchange.answers, exchange.harmful, strict=True)


def score(detector: HarmDetector, exchanges: Sequence[Exchange]) -> Scored:
    items = [(i, *item) for i, exchange in enumerate(exchanges) for item in labelled(exchange)]
    return Scored(
        harm=harm_scores(detector, [(exchanges[i].question, answer) for i, answer, _ in items]),
        harmful=np.array([harmful for *_, harmful in items], bool),
        asked=np.array([answer is None for _, answer, _ in items], bool),
        exchange=np.array([i for i, *_ in items], int),
    )


def harm_scores(detector: HarmDetector, texts: Sequence[tuple[str, str | None]]) -> np.ndarray:
    """How sure the detector is of harm in questions, alone or with an answer, (N,)."""
    shortest_first = sorted(texts, key=lambda text: len(text[0]) + len(text[1] or ""))
    scores = dict(zip(shortest_first, detector.score(shortest_first), strict=True))
    return np.array([scores[text][0] for text in texts], np.float32)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve: how often a positive one scores higher than a negative one; ties count half.

    Raises `InputError` without one of both.
    """
    if positive.all() or not positive.any():
        raise InputError("a ROC curve needs harmful texts and harmless ones: the data has only one kind")
    wins = mannwhitneyu(scores[positive], scores[~positive]).statistic
    return float(wins / (positive.sum() * (~positive).sum()))


def resampled(scored: Scored, *, seed: int, times: int = 300) -> tuple[float, float]:
    """The 95% interval of the AUROC, by drawing as many exchanges with replacement `times` times."""
    rng = np.random.default_rng(seed)
    count = int(scored.exchange.max()) + 1
    rows = [np.flatnonzero(scored.exchange == i) for i in range(count)]
    areas = []
    for _ in range(times):
        drawn = np.concatenate([rows[i] for i in rng.integers(count, size=count)])
        if scored.harmful[drawn].any() and not scored.harmful[drawn].all():
            areas.append(auroc(scored.harm[drawn], scored.harmful[drawn]))
    low, high = np.quantile(areas, (0.025, 0.975))
    return float(low), float(high)


def roc(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds from high to low, and the shares of the negatives and of the positives that each flags."""
    thresholds = np.unique(scores)[::-1]
    flags = [np.searchsorted(np.sort(scores[kind]), thresholds) for kind in (~positive, positive)]
    return thresholds, *(
        1 - below / max(kind.sum(), 1) for below, kind in zip(flags, (~positive, positive), strict=True)
    )


def choose_threshold(scores: np.ndarray, positive: np.ndarray, *, most: float) -> float:
    """The score from which on a text counts as harmful.

    Of all thresholds that flag at most the share `most` of what is harmless, those that flag most of what is harmful;
    of these the middle. `most` is held by the upper end of the 95% interval of the share, where there are texts enough
    for that. Raises `InputError` where harmful or harmless texts are missing.
    """
    auroc(scores, positive)  # that there are both
    thresholds, false, true = roc(scores, positive)
    negatives = int((~positive).sum())
    allowed = np.round(false * negatives) <= most_hits(negatives, most)
    if not allowed.any():  # what scores highest is harmless
        return float(np.nextafter(thresholds[0], 1, dtype=np.float32))
    best = np.flatnonzero(true == true[allowed].max())
    best = best[allowed[best]]
    # They flag as much down to the next lower score.
    lower = thresholds[best[-1] + 1] if best[-1] + 1 < len(thresholds) else 0.0
    return float((thresholds[best[0]] + lower) / 2)


def most_hits(of: int, most: float) -> int:
    """How many may be flagged so that the 95% interval ends below `most`; of too few texts, as many as that share."""
    hits = 0
    while share_interval(hits, of)[1] <= most:
        hits += 1
    return hits - 1 if hits else int(most * of)


def share_interval(hits: int, of: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share. Raises `InputError` for a share of nothing."""
    if of == 0:
        raise InputError("there is nothing to take a share of")
    interval = binomtest(hits, of).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
