"""What a model was sure of, and whether it was right: from results and truths to confidences and bools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import numpy as np

from detgpt.boxes import iou_matrix
from detgpt.evaluation.data import Record
from detgpt.evaluation.metrics import outside_ignored
from detgpt.results import Detections

RIGHT_IOU = 0.5

Answered: TypeAlias = Iterable[tuple[Record, Detections]]


class Judged(NamedTuple):
    """N claims: how sure (float64), whether right (bool), and the number of the picture that each is about."""

    confidences: np.ndarray
    correct: np.ndarray
    pictures: np.ndarray

    @property
    def rights_and_wrongs(self) -> tuple[int, int]:
        return int(self.correct.sum()), int((~self.correct).sum())


def judged_targets(answered: Answered) -> Judged:
    """Each named target, right when it is among the true ones; not where names are not judged, or the reasoner gave no
    confidence."""
    return _judged(
        (record, target.confidence, is_right(target.name, record))
        for record, result in answered
        if record.named
        for target in result.targets
        if target.confidence is not None
    )


def judged_boxes(answered: Answered) -> Judged:
    """Each box, right when it overlaps a true box of its label by an IoU of 0.5 or more.

    So it is the detector that is judged, not the reasoner who chose the label: a box of something that does not fit the
    wish is judged only where it is known that there is no such thing in the picture. Boxes in ignored regions are not
    judged at all. Where the truth is a place without a name, any true box will do.
    """
    return _judged(row for record, result in answered for row in _box_rows(record, result))


def is_right(name: str, record: Record) -> bool:
    """Whether `name`, or what it is a synonym of, is a true target."""
    return record.canonical(name).casefold() in _folded(record.targets)


Row: TypeAlias = tuple[Record, float, bool]


def _box_rows(record: Record, result: Detections) -> Iterable[Row]:
    found = outside_ignored(result, record)
    overlaps = iou_matrix(found.boxes.astype(np.float64), record.boxes) >= RIGHT_IOU
    true, present = [label.casefold() for label in record.labels], _folded(record.present)
    for label, score, overlapped in zip(found.labels, found.scores.tolist(), overlaps, strict=True):
        name = record.canonical(label).casefold()
        if not record.named:
            yield record, score, bool(overlapped.any())
        elif name in true or name not in present:
            yield record, score, any(hit and name == other for hit, other in zip(overlapped, true, strict=True))


def _judged(rows: Iterable[Row]) -> Judged:
    rows = list(rows)
    numbers: dict[object, int] = {}
    pictures = [numbers.setdefault(record.image, len(numbers)) for record, _, _ in rows]
    confidences, correct = [confidence for _, confidence, _ in rows], [right for _, _, right in rows]
    return Judged(np.array(confidences, np.float64), np.array(correct, bool), np.array(pictures, np.int64))


def _folded(names: Iterable[str]) -> set[str]:
    return {name.casefold() for name in names}
