"""Preference pairs from scored answers: which of two answers to a wish is the better one.

    write_records(Path("data/preferences"), pairs(samples, "max_min", seed=0))

The pairs are records with `chosen` and `rejected`, as `dpo` and `reward` learn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from finetune.data.records import Row
from finetune.preference.samples import Sampled, record_of

Pairing = Literal["max_min", "max_random"]


def pairs(samples: Sequence[Sampled], pairing: Pairing, *, seed: int = 0) -> list[Row]:
    """A pair of each wish: its best answer, and its worst ("max_min") or one of the worse ones ("max_random").

    A wish whose answers are all worth the same makes none, nor do answers without a word.
    """
    chance = np.random.default_rng(seed)
    rows = []
    for sampled in samples:
        scored = zip(sampled["rewards"], sampled["answers"], strict=True)
        worded = sorted(((reward, answer) for reward, answer in scored if answer.strip()), key=lambda pair: -pair[0])
        worse = [answer for reward, answer in worded if reward < worded[0][0]]
        if worse:
            rejected = worse[-1] if pairing == "max_min" else worse[int(chance.integers(len(worse)))]
            rows.append(record_of(sampled, chosen=worded[0][1], rejected=rejected))
    return rows
