"""Label Studio's JSON export (not JSON-MIN): tasks with rectangles in percent of the picture.

    [{"id": 1, "data": {"image": "/data/upload/1/4f2a7c9e-desk.jpg"}, "annotations": [{"was_cancelled": false,
      "result": [{"type": "rectanglelabels", "to_name": "image", "original_width": 90, "original_height": 60,
                  "image_rotation": 0, "value": {"x": 10, "y": 10, "width": 20, "height": 40, "rotation": 0,
                                                 "rectanglelabels": ["cup"]}}]}]}]

Of several annotations of a task the first that was not cancelled counts; predictions do not. A picture with a turned
rectangle, or that was turned itself, is left out whole: without that box its truth would be false. The pictures lie in
--images, by the name in the task, with or without the upload's prefix.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.readers import Source
from detgpt.evaluation.readers.coco import image_folder
from detgpt.images import PICTURE_SUFFIXES
from finetune.data.convert import Converted
from finetune.data.records import Row

USES = frozenset({"images"})
HINT = "Label Studio's JSON export is a list of tasks with 'data' and 'annotations'"
UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")
RECTANGLE = "rectanglelabels"


class _LeftOut(Exception):
    """Why a task gives no record."""


def convert(source: Source) -> Converted:
    tasks = fields.read_json(source.path, HINT)
    if not isinstance(tasks, list):
        raise InputError(f"{source.path} is something else: {HINT}")
    folder = source.images or image_folder(source.path.parent)
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    for number, task in enumerate(tasks):
        where = f"{source.path}, task {task.get('id', number) if isinstance(task, dict) else number}"
        try:
            rows.append(_row(task, folder, where))
        except _LeftOut as reason:
            left_out[str(reason)] += 1
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{where} is not of this form ({error!r}): {HINT}") from error
    return Converted.of(rows, *(f"{count} pictures were left out: {reason}." for reason, count in left_out.items()))


def _row(task: dict[str, Any], folder: Path, where: str) -> Row:
    usable = [annotation for annotation in task["annotations"] if not annotation.get("was_cancelled")]
    if not usable:
        raise _LeftOut("nobody annotated them")
    boxes, labels = [], []
    for result in usable[0]["result"]:
        value = result.get("value", {})
        if result.get("type") != RECTANGLE:
            continue
        if value.get("rotation") or result.get("image_rotation"):
            raise _LeftOut("a rectangle or the picture is rotated, and boxes here have upright sides")
        width, height = result["original_width"] / 100, result["original_height"] / 100
        x, y = value["x"] * width, value["y"] * height
        for label in value[RECTANGLE]:
            boxes.append([round(edge, 2) for edge in (x, y, x + value["width"] * width, y + value["height"] * height)])
            labels.append(label)
    image = _image(task["data"], folder, where)
    return {"image": str(image), "boxes": boxes, "labels": labels, "present": list(dict.fromkeys(labels))}


def _image(data: dict[str, Any], folder: Path, where: str) -> Path:
    """The task's picture in `folder`; by its whole path in there, its name, or the name before the upload."""
    for value in data.values():
        if not isinstance(value, str):
            continue
        parts = urlsplit(value)
        path = Path(unquote(parse_qs(parts.query).get("d", [parts.path])[0]).lstrip("/"))  # local files: ?d=path
        if path.suffix.lower() in PICTURE_SUFFIXES:
            candidates = [folder / path, folder / path.name, folder / UPLOAD_PREFIX.sub("", path.name)]
            return next((file for file in candidates if file.is_file()), candidates[1])
    raise InputError(f"{where}: 'data' names no picture ({', '.join(PICTURE_SUFFIXES)}): {str(data)[:100]}")
