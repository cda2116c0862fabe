"""An evaluation set: a folder with `data.jsonl`, one record per picture and wish.

    {"image": "images/0001.webp", "instruction": "I am thirsty", "targets": ["milk"],
     "boxes": [[10, 20, 60, 90]], "labels": ["milk"], "present": ["milk", "hammer"], "kind": "need"}

`targets` names what fits the wish and is in the picture, [] when nothing is; every instance of a target has
a box (xyxy in pixels) and its name in `labels`. `present` names everything in the picture. `kind`, optional,
groups the wishes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detgpt.errors import InputError

DATA_FILE = "data.jsonl"
MAX_PIXEL = 1e6  # also keeps out infinity and, by comparing false, NaN


@dataclass(frozen=True, eq=False)
class Record:
    """A picture, a wish, and the truth about it; boxes (N, 4) float64 xyxy in pixels, one label each."""

    image: Path
    instruction: str
    targets: tuple[str, ...]
    boxes: np.ndarray
    labels: tuple[str, ...]
    present: tuple[str, ...]
    kind: str


@dataclass(frozen=True, eq=False)
class ImageTruth:
    """Every box that any wish about one picture has as truth."""

    image: Path
    boxes: np.ndarray
    labels: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.labels))


def read_records(folder: str | Path, limit: int | None = None) -> list[Record]:
    """The records of `folder`, the first `limit` of them. Raises `InputError` that names file and line."""
    file = Path(folder) / DATA_FILE
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit!r} leaves no record: give 1 or more, or None for all")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file} ({error}): an evaluation folder holds {DATA_FILE} in UTF-8") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()][:limit]
    if not numbered:
        raise InputError(f"{file} holds no record: write one JSON object a line")
    return [_record(line, file.parent, f"{file}, line {number}") for number, line in numbered]


def truth_by_image(records: Iterable[Record]) -> list[ImageTruth]:
    """The distinct pictures of `records` in order, each with the union of its records' labelled boxes."""
    union: dict[Path, dict[tuple[str, tuple[float, ...]], None]] = {}
    for record in records:
        rows = zip(record.labels, map(tuple, record.boxes.tolist()), strict=True)
        union.setdefault(record.image, {}).update(dict.fromkeys(rows))
    return [
        ImageTruth(image, _array([box for _, box in rows]), tuple(label for label, _ in rows))
        for image, rows in union.items()
    ]


def _record(line: str, folder: Path, where: str) -> Record:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a record is a JSON object, got {line[:60]!r}")
    row = {"kind": "", **row}
    for key in ("image", "instruction", "kind"):
        if not isinstance(row.get(key), str) or not (row[key].strip() or key == "kind"):
            raise InputError(f"{where}: {key!r} must be a text, got {row.get(key)!r}")
    for key in ("targets", "labels", "present"):
        if not isinstance(row.get(key), list) or not all(isinstance(n, str) and n.strip() for n in row[key]):
            raise InputError(f"{where}: {key!r} must be a list of names, got {row.get(key)!r}")
    if not _are_boxes(row.get("boxes")):
        raise InputError(f"{where}: 'boxes' must hold [x0, y0, x1, y1] with x0 < x1 and y0 < y1 in pixels")
    _check_agreement(row, where)
    image = folder / row["image"]
    if not image.is_file():
        raise InputError(f"{where}: there is no image {image}")
    return Record(
        image=image,
        instruction=row["instruction"],
        targets=tuple(row["targets"]),
        boxes=_array(row["boxes"]),
        labels=tuple(row["labels"]),
        present=tuple(row["present"]),
        kind=row["kind"],
    )


def _check_agreement(row: dict[str, Any], where: str) -> None:
    if len(row["boxes"]) != len(row["labels"]):
        raise InputError(f"{where}: {len(row['boxes'])} boxes but {len(row['labels'])} labels; give each box one")
    if set(row["labels"]) != set(row["targets"]):
        odd = sorted(set(row["labels"]) ^ set(row["targets"]))
        raise InputError(f"{where}: every target needs a box and every box a target's label; check {odd}")
    if absent := sorted(set(row["targets"]) - set(row["present"])):
        raise InputError(f"{where}: targets {absent} are not in 'present', the names of what the picture shows")


def _are_boxes(boxes: Any) -> bool:
    return isinstance(boxes, list) and all(
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, (int, float)) and abs(value) < MAX_PIXEL for value in box)
        and box[0] < box[2]
        and box[1] < box[3]
        for box in boxes
    )


def _array(boxes: list[Any]) -> np.ndarray:
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
