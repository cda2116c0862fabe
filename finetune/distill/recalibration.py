"""How a cached teacher's word is taken: as it is, at a temperature, or with a smoothed first choice.

    recalibration = fitted("temperature", Cache(folder), labels)
    target = recalibration(kept)

The strength is fitted on the teacher's cache of the validation records, where the true tokens are known (`trust.fit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from detgpt.errors import InputError
from detgpt.evaluation.calibration import summary
from detgpt.evaluation.diagrams import reliability, save_figure
from detgpt.evaluation.judging import Judged
from detgpt.evaluation.trust import CALIBRATED, RAW
from finetune.batching import IGNORED
from finetune.distill.cache import Cache, Header
from finetune.distill.sparse import Kept
from finetune.distill.trust import (
    SMOOTHING_RANGE,
    TEMPERATURE_RANGE,
    Target,
    first_choices,
    fit,
    likelihood_loss,
    plain,
    smoothed,
    tempered,
)
from finetune.encoding import RecordEncoder
from finetune.rundir import write_json

Way = Literal["temperature", "smoothing"]
FILE = "recalibration"


@dataclass(frozen=True)
class Recalibration:
    """way: None for the teacher's own word. temperatures, vocabulary: of the cache."""

    temperatures: Sequence[float]
    vocabulary: int
    way: Way | None = None
    strength: float = 1.0

    def __call__(self, kept: Kept) -> Target:
        if self.way == "temperature":
            return tempered(kept, self.temperatures, self.strength, self.vocabulary)
        target = plain(kept, self.temperatures)
        return smoothed(target, self.strength) if self.way == "smoothing" else target


def recalibration(header: Header, way: Way | None, strength: float = 1.0) -> Recalibration:
    """Raises `InputError` for a cache that cannot be recalibrated this way."""
    if way is not None and header.kept == "random":
        raise InputError("recalibrate: random draws stand for the teacher as it is: leave it out (null)")
    if way == "temperature" and len(header.temperatures) < 2:
        raise InputError(
            "recalibrate: temperature needs the tail at two temperatures, and this cache has it at "
            f"{list(header.temperatures)}: take smoothing, or cache a local teacher with temperatures=[1, 2]"
        )
    if way == "smoothing" and header.k < 2:
        raise InputError("recalibrate: smoothing needs k of two tokens or more: the others get what the first gives")
    return Recalibration(header.temperatures, header.vocabulary, way, strength)


def fitted(way: Way, cache: Cache, labels: torch.Tensor) -> Recalibration:
    """The recalibration that makes `labels` (rows,), the true tokens of all rows of `cache`, likeliest."""
    kept = cache.kept(torch.arange(cache.header.rows))

    def loss(strength: float) -> torch.Tensor:
        return likelihood_loss(recalibration(cache.header, way, strength)(kept), labels)

    limits = TEMPERATURE_RANGE if way == "temperature" else SMOOTHING_RANGE
    return recalibration(cache.header, way, fit(loss, limits))


def true_tokens(cache: Cache, records: Any, encoder: RecordEncoder) -> torch.Tensor:
    """(rows,): the true token of each row of a cache of these records. Raises `InputError` if it is of others."""
    if len(records) != len(cache):
        raise InputError(f"{cache.folder} is of {len(cache)} records, and there are {len(records)}")
    tokens = []
    for number, record in enumerate(records):
        labels = encoder.encode(record)["labels"]
        learned = labels[labels != IGNORED]
        cache.rows_of(number, learned, record["where"])
        tokens.append(learned)
    return torch.cat(tokens)


def report(folder: Path, found: Recalibration, cache: Cache, labels: torch.Tensor) -> None:
    """Write recalibration.json and a reliability diagram of the teacher's first choices, before and after."""
    kept = cache.kept(torch.arange(cache.header.rows))
    numbers: dict[str, Any] = {"way": found.way, "strength": found.strength}
    stages = {}
    for stage, way in ((RAW, recalibration(cache.header, None)), (CALIBRATED, found)):
        target = way(kept)
        confidence, right = first_choices(target, labels)
        stages[stage] = Judged(confidence, right, np.zeros(len(right), np.int64))
        numbers[stage] = {**summary(confidence, right), "true_nll": float(likelihood_loss(target, labels).mean())}
    write_json(folder / f"{FILE}.json", numbers)
    save_figure(reliability({Path(cache.header.teacher).name: {"tokens": stages}}), folder / FILE)
