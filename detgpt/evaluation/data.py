"""What an evaluation set holds, whatever format it was read from: pictures, wishes, and the truth about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from detgpt.evaluation.outlines import Outlines


def box_array(boxes: Iterable[Iterable[float]] = ()) -> np.ndarray:
    """Boxes as (N, 4) float64, also where there is none."""
    return np.array([list(box) for box in boxes], dtype=np.float64).reshape(-1, 4)


@dataclass(frozen=True, eq=False)
class Record:
    """A picture, a wish, and the truth about it.

    targets: names of what fits the wish and is in the picture; () when nothing is.
    boxes: (N, 4) float64 xyxy in pixels, one of `labels` each.
    present: names of everything that is known to be in the picture.
    kind: groups the wishes; may be empty.
    synonyms: for a target, other names that are as right.
    ignored: (M, 4) boxes, one of `ignored_labels` each, of regions where a box is neither right nor wrong.
    outlines: the targets' true pixels, None where the data has boxes only.
    named: whether the targets' names are what a reasoner should say; False where the truth is a place without
        a name of its own, as for "the left one", so that names cannot be judged.
    where: file and line, or their like, for messages.
    """

    image: Path
    instruction: str
    targets: tuple[str, ...]
    boxes: np.ndarray
    labels: tuple[str, ...]
    present: tuple[str, ...]
    kind: str = ""
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: np.ndarray = field(default_factory=box_array)
    ignored_labels: tuple[str, ...] = ()
    outlines: Outlines | None = None
    named: bool = True
    where: str = ""

    def canonical(self, name: str) -> str:
        """The target that `name` is a synonym of, otherwise `name` itself; ignoring case."""
        folded = name.casefold()
        for target, others in self.synonyms.items():
            if folded in (other.casefold() for other in others):
                return target
        return name


@dataclass(frozen=True)
class Dataset:
    """Records in order, and what a reader left out or assumed, in sentences."""

    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ImageTruth:
    """Every box, and every ignored one, that any wish about one picture has as truth."""

    image: Path
    boxes: np.ndarray
    labels: tuple[str, ...]
    ignored: np.ndarray
    ignored_labels: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.labels))


Row = tuple[str, tuple[float, ...]]


def truth_by_image(records: Iterable[Record]) -> list[ImageTruth]:
    """The distinct pictures of `records` in order, each with the union of its records' labelled boxes."""
    union: dict[Path, tuple[dict[Row, None], dict[Row, None]]] = {}
    for record in records:
        true, ignored = union.setdefault(record.image, ({}, {}))
        true.update(dict.fromkeys(_rows(record.labels, record.boxes)))
        ignored.update(dict.fromkeys(_rows(record.ignored_labels, record.ignored)))
    return [
        ImageTruth(
            image,
            box_array(box for _, box in true),
            tuple(label for label, _ in true),
            box_array(box for _, box in ignored),
            tuple(label for label, _ in ignored),
        )
        for image, (true, ignored) in union.items()
    ]


def _rows(labels: tuple[str, ...], boxes: np.ndarray) -> list[Row]:
    return [(label, tuple(box)) for label, box in zip(labels, boxes.tolist(), strict=True)]
