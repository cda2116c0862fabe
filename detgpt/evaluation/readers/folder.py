"""DetGPT's own format: a folder with `data.jsonl`, one record per picture and wish.

    {"image": "images/0001.webp", "instruction": "I am thirsty", "targets": ["milk"],
     "boxes": [[10, 20, 60, 90]], "labels": ["milk"], "present": ["milk", "hammer"], "kind": "need"}

`targets` names what fits the wish and is in the picture, [] when nothing is; every instance of a target has
a box (xyxy in pixels) and its name in `labels`. `present` names everything in the picture. Optional: `kind`
groups the wishes; `synonyms` {target: [names]} are as right as the target; `ignored` and `ignored_labels` are
boxes of regions where a box is neither right nor wrong; `segmentations` are COCO's, one for each box and then
one for each ignored box. Lines for training only, which lack an instruction or boxes, are left out.
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

DATA_FILE = "data.jsonl"
USES = frozenset[str]()


def recognises(path: Path) -> bool:
    return (path / DATA_FILE).is_file() or path.name == DATA_FILE


def read(source: Source) -> Dataset:
    file = source.path if source.path.name == DATA_FILE else source.path / DATA_FILE
    lines = list(fields.read_rows(file, f"an evaluation folder holds {DATA_FILE} in UTF-8"))
    measurable = [(where, row) for where, row in lines if not _is_for_training(row)]
    left_out = len(lines) - len(measurable)
    note = f"{left_out} of {len(lines)} records of {file} have no instruction or no boxes and were left out."
    records = tuple(read_record(row, file.parent, where) for where, row in measurable)
    return Dataset(records, (note,) if left_out else ())


def read_record(row: dict[str, Any], folder: Path, where: str) -> Record:
    """The record of a line with a wish and its boxes. Raises `InputError` that starts with `where`."""
    record = Record(
        image=folder / fields.text(row, "image", where),
        instruction=fields.text(row, "instruction", where),
        targets=fields.names(row, "targets", where),
        boxes=box_array(fields.boxes(row, "boxes", where)),
        labels=fields.names(row, "labels", where),
        present=fields.names(row, "present", where),
        kind=fields.text(row, "kind", where, default=""),
        synonyms=fields.synonyms(row, where),
        ignored=box_array(fields.boxes(row, "ignored", where, default=[])),
        ignored_labels=fields.names(row, "ignored_labels", where, default=[]),
        outlines=_outlines(row, where),
        where=where,
    )
    _check_agreement(record)
    return record


def _is_for_training(row: dict[str, Any]) -> bool:
    """Whether the line is text, a conversation, a wish without boxes, or boxes without a wish."""
    return "text" in row or "messages" in row or ("instruction" in row) != ("boxes" in row)


def to_row(record: Record, image: str) -> dict[str, Any]:
    """`record` as a line has it, for a picture that lies at `image` in the folder."""
    row = {
        "image": image,
        "instruction": record.instruction,
        "targets": list(record.targets),
        "boxes": _rounded(record.boxes),
        "labels": list(record.labels),
        "present": list(record.present),
        "kind": record.kind,
        "synonyms": {target: list(others) for target, others in record.synonyms.items()},
        "ignored": _rounded(record.ignored),
        "ignored_labels": list(record.ignored_labels),
    }
    if record.outlines is not None:
        layers = sorted(record.outlines.layers, key=lambda layer: layer.ignored)
        row["segmentations"] = [layer.segmentation for layer in layers]
    return row


def _rounded(boxes: np.ndarray) -> list[list[float]]:
    return [[round(value, 2) for value in box] for box in boxes.tolist()]


def _outlines(row: dict[str, Any], where: str) -> Outlines | None:
    segmentations = row.get("segmentations")
    if segmentations is None:
        return None
    true, ignored = len(row["boxes"]), len(row.get("ignored", []))
    if not isinstance(segmentations, list) or len(segmentations) != true + ignored:
        raise InputError(f"{where}: 'segmentations' must be a list with one for each of {true} + {ignored} boxes")
    layers = [Outline(checked_segmentation(value, where), i >= true) for i, value in enumerate(segmentations)]
    return Outlines((*layers[true:], *layers[:true]))


def _check_agreement(record: Record) -> None:
    for boxes, labels in ((record.boxes, record.labels), (record.ignored, record.ignored_labels)):
        if len(boxes) != len(labels):
            raise InputError(f"{record.where}: {len(boxes)} boxes but {len(labels)} labels; give each box one")
    if set(record.labels) != set(record.targets):
        odd = sorted(set(record.labels) ^ set(record.targets))
        raise InputError(f"{record.where}: every target needs a box and every box a target's label; check {odd}")
    if absent := sorted(set(record.targets) - set(record.present)):
        raise InputError(f"{record.where}: targets {absent} are not in 'present', the names of what the picture shows")
