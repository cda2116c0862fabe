"""ReasonSeg (LISA): a folder of pictures, each with a JSON of the same name.

    {"text": ["something to drink from"], "is_sentence": false,
     "shapes": [{"label": "target", "points": [[10, 20], [60, 20], [60, 90]]}]}

Read as by LISA's `utils/data_processing.py`: larger shapes are painted first, a label with "ignore" in it
marks pixels that do not count, "flag" is an outdated label. Only the first text of a picture is asked, as in
LISA's validation. A box is the hull of one "target" polygon, so a thing in two pieces has two boxes; judge by
gIoU and cIoU, which do not care. Names are not judged, because there are none.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.data import Dataset, Record, box_array
from detgpt.evaluation.outlines import Outline, Outlines, checked_segmentation

if TYPE_CHECKING:
    from detgpt.evaluation.readers import Source

USES = frozenset({"images"})
TARGET, IGNORE, OUTDATED = "target", "ignore", "flag"
HINT = "a ReasonSeg annotation holds 'text' and 'shapes'"
ENCODINGS = ("utf-8", "cp1252")  # some files of the published set are in the latter


def recognises(path: Path) -> bool:
    first = next(iter(sorted(path.glob("*.json"))), None) if path.is_dir() else None
    if first is None or _image(first, path) is None:
        return False
    row = fields.read_json(first, HINT, ENCODINGS)
    return isinstance(row, dict) and {"text", "shapes"} <= set(row)


def read(source: Source) -> Dataset:
    return Dataset(tuple(_record(file, source.images or source.path) for file in sorted(source.path.glob("*.json"))))


def _record(file: Path, images: Path) -> Record:
    where, row = str(file), fields.read_json(file, HINT, ENCODINGS)
    if not isinstance(row, dict) or not isinstance(row.get("shapes"), list):
        raise InputError(f"{where} is something else: {HINT}")
    texts = fields.names(row, "text", where)
    if not texts:
        raise InputError(f"{where}: 'text' holds no instruction")
    layers = sorted((_layer(shape, where) for shape in row["shapes"] if _counts(shape, where)), key=_area, reverse=True)
    boxes, ignored = ([_hull(layer) for layer in layers if layer.ignored is side] for side in (False, True))
    return Record(
        image=_image(file, images) or images / f"{file.stem}.jpg",
        instruction=texts[0].strip(),
        targets=(TARGET,) if boxes else (),
        boxes=box_array(boxes),
        labels=(TARGET,) * len(boxes),
        present=(),
        kind="sentence" if row.get("is_sentence") else "phrase",
        ignored=box_array(ignored),
        ignored_labels=(TARGET,) * len(ignored),
        outlines=Outlines(tuple(layers), edges=True),
        named=False,
        where=where,
    )


def _counts(shape: Any, where: str) -> bool:
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        raise InputError(f"{where}: a shape is an object with 'label' and 'points', got {str(shape)[:60]}")
    return shape["label"].lower() != OUTDATED


def _layer(shape: dict[str, Any], where: str) -> Outline:
    points = shape.get("points")
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise InputError(f"{where}: 'points' must be a list of [x, y], got {str(points)[:60]}")
    polygon = [value for point in points for value in point]
    return Outline(checked_segmentation([polygon], where), ignored=IGNORE in shape["label"].lower())


def _corners(layer: Outline) -> np.ndarray:
    return np.array(layer.segmentation[0], dtype=np.float64).reshape(-1, 2)


def _area(layer: Outline) -> float:
    x, y = _corners(layer).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _hull(layer: Outline) -> list[float]:
    """The box around the pixels of a polygon, edges included: [x0, x1 + 1) x [y0, y1 + 1)."""
    corners = np.trunc(_corners(layer))
    return [*corners.min(axis=0).tolist(), *(corners.max(axis=0) + 1).tolist()]


def _image(file: Path, images: Path) -> Path | None:
    found = (images / f"{file.stem}{suffix}" for suffix in (".jpg", ".jpeg", ".png"))
    return next((image for image in found if image.is_file()), None)
