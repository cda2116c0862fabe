"""ODVG, the JSON lines of Open-GroundingDINO and MM-Grounding-DINO: boxes by category or by phrases of a caption.

    {"filename": "1.jpg", "height": 60, "width": 90, "detection": {"instances": [
        {"bbox": [10, 10, 30, 30], "label": 0, "category": "cup"}]}}
    {"filename": "2.jpg", "height": 60, "width": 90, "grounding": {"caption": "a red cup on a desk", "regions": [
        {"bbox": [[10, 10, 30, 30]], "phrase": "a red cup"}]}}

Boxes are xyxy in pixels, one or a list of them a region. Phrases become labels; the caption becomes what is said of
the picture. Where instances have only a `label`, --annotations takes the label map, {"0": "cup"}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import find_image
from detgpt.evaluation.readers import Source
from detgpt.evaluation.readers.coco import image_folder
from finetune.data.convert import Converted, caption_messages
from finetune.data.records import Row

USES = frozenset({"annotations", "images"})
HINT = "ODVG is JSON lines with 'filename' and 'detection' or 'grounding'"


def convert(source: Source) -> Converted:
    label_map = fields.read_json(source.annotations, 'a label map is {"0": "cup"}') if source.annotations else {}
    folder = source.images or image_folder(source.path.parent)
    rows, without_area = [], 0
    for where, line in fields.read_rows(source.path, HINT):
        for row in _rows(line, label_map, folder, where):
            whole = [fields.is_box(box) for box in row["boxes"]]
            without_area += whole.count(False)
            for key in ("boxes", "labels"):
                row[key] = [value for value, is_whole in zip(row[key], whole, strict=True) if is_whole]
            rows.append(row | {"present": list(dict.fromkeys(row["labels"]))})
    note = f"{without_area} boxes have no area and were left out." if without_area else ""
    return Converted.of(rows, note)


def _rows(line: dict[str, Any], label_map: Mapping[str, str], folder: Path, where: str) -> Iterator[Row]:
    """One record for each of the parts that the line has."""
    image = str(find_image(folder, fields.text(line, "filename", where)))
    if "detection" not in line and "grounding" not in line:
        raise InputError(f"{where}: {HINT}")
    if "detection" in line:
        things = [
            (thing.get("bbox"), _category(thing, label_map, where))
            for thing in _list(line, "detection", "instances", where)
        ]
        yield {"image": image, "boxes": [box for box, _ in things], "labels": [label for _, label in things]}
    if "grounding" in line:
        regions = [
            (box, fields.text(region, "phrase", where))
            for region in _list(line, "grounding", "regions", where)
            for box in _boxes(region.get("bbox"))
        ]
        said = caption_messages(fields.text(line["grounding"], "caption", where))
        yield {
            "image": image,
            "messages": said,
            "boxes": [box for box, _ in regions],
            "labels": [name for _, name in regions],
        }


def _list(line: dict[str, Any], kind: str, key: str, where: str) -> list[dict[str, Any]]:
    value = line[kind].get(key) if isinstance(line[kind], dict) else None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InputError(f"{where}: '{kind}' must have a list of objects as '{key}'")
    return value


def _boxes(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value and isinstance(value[0], list) else [value]


def _category(thing: dict[str, Any], label_map: Mapping[str, str], where: str) -> str:
    name = thing.get("category") or label_map.get(str(thing.get("label")))
    if not isinstance(name, str):
        raise InputError(
            f"{where}: an instance has no 'category', and label {thing.get('label')!r} is not in a label map: "
            "give the map as --annotations"
        )
    return name
