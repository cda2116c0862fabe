"""Annotated pictures for a detector's training, from the two formats that Grounding DINO's users have.

    read_examples(Path("annotations/train.json"), Path("train"))                  # COCO: also LVIS, Objects365, …
    read_examples(Path("odvg.jsonl"), Path("train"), Path("label_map.json"))      # ODVG, as Open-GroundingDINO reads it

A line of ODVG is one picture, `{"filename": …, "height": …, "width": …}` with either all its things,
`"detection": {"instances": [{"bbox": [x0, y0, x1, y1], "label": 0, "category": "cup"}]}`, or a caption's phrases,
`"grounding": {"caption": …, "regions": [{"bbox": […], "phrase": "a red cup"}]}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import Picture, find_image, read_annotations
from detgpt.evaluation.data import box_array

ODVG_HINT = "an ODVG file holds one picture a line, with 'filename' and 'detection' or 'grounding'"


@dataclass(frozen=True)
class Vocabulary:
    """The names whose every thing is boxed in a picture, so that one without a box is not there.

    synonyms: for a name, others that are as right.
    """

    names: tuple[str, ...]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Example:
    """A picture and what is known to be in it.

    boxes: (N, 4) xyxy in pixels, one of `labels` each. ignored: (M, 4) regions with crowds of `ignored_labels`, where
    a box is neither right nor wrong.
    """

    image: Path
    boxes: np.ndarray
    labels: tuple[str, ...]
    vocabulary: Vocabulary
    ignored: np.ndarray = field(default_factory=box_array)
    ignored_labels: tuple[str, ...] = ()


def read_examples(annotations: Path, images: Path, label_map: Path | None = None) -> list[Example]:
    """The pictures of a COCO file (.json) or an ODVG file (.jsonl), whose image files are in the folder `images`.

    label_map: for ODVG, a JSON file of label numbers to names, `{"0": "person", …}`; without it the names are those
    that occur. Raises `InputError` for an entry that is wrong, a picture that is missing, and a set without a box.
    """
    if annotations.suffix == ".jsonl":
        examples = list(_read_odvg(annotations, images, label_map))
    elif label_map is not None:
        raise InputError(f"{annotations} is no ODVG file (.jsonl), so it has no use for the label_map {label_map}")
    else:
        examples = list(_read_coco(annotations, images))
    for example in examples:
        if not example.image.is_file():
            raise InputError(f"{annotations}: there is no picture {example.image}; 'images' is the folder they are in")
    if not any(len(example.boxes) for example in examples):
        raise InputError(f"{annotations} has no box to learn from")
    return examples


def _read_coco(file: Path, folder: Path) -> Iterator[Example]:
    annotations = read_annotations(file)
    vocabulary = Vocabulary(tuple(dict.fromkeys(annotations.categories)), annotations.synonyms)
    for picture in annotations.pictures:
        yield _of_picture(picture, folder, vocabulary)


def _of_picture(picture: Picture, folder: Path, vocabulary: Vocabulary) -> Example:
    single = [thing for thing in picture.things if not thing.crowd]
    crowds = [thing for thing in picture.things if thing.crowd]
    return Example(
        image=find_image(folder, picture.file_name),
        boxes=box_array(thing.box for thing in single),
        labels=tuple(thing.label for thing in single),
        vocabulary=vocabulary,
        ignored=box_array(thing.box for thing in crowds),
        ignored_labels=tuple(thing.label for thing in crowds),
    )


def _read_odvg(file: Path, folder: Path, label_map: Path | None) -> Iterator[Example]:
    numbered = _read_label_map(label_map) if label_map is not None else {}
    rows = []
    for where, row in fields.read_rows(file, ODVG_HINT):
        image = find_image(folder, fields.text(row, "filename", where))
        things = _detection(row, numbered, where) if "detection" in row else _grounding(row, where)
        rows.append((image, *things, "detection" in row))
    occurring = dict.fromkeys(label for _, _, labels, whole in rows if whole for label in labels)
    vocabulary = Vocabulary(tuple(dict.fromkeys([*numbered.values(), *occurring])))
    for image, boxes, labels, whole in rows:
        # What a caption does not speak of may be in the picture all the same: ask for its own phrases only.
        own = vocabulary if whole else Vocabulary(tuple(dict.fromkeys(labels)))
        yield Example(image, box_array(boxes), tuple(labels), own)


def _detection(row: Mapping[str, Any], numbered: Mapping[str, str], where: str) -> tuple[list[list[float]], list[str]]:
    def name(instance: Mapping[str, Any]) -> str:
        number = str(instance.get("label"))
        if number in numbered:
            return numbered[number]
        if numbered:
            raise InputError(f"{where}: label {number} is not in the label map, which has {len(numbered)} names")
        return fields.text(instance, "category", where)

    instances = _objects(row, "detection", "instances", where)
    return _boxes(instances, where), [name(instance) for instance in instances]


def _grounding(row: Mapping[str, Any], where: str) -> tuple[list[list[float]], list[str]]:
    regions = _objects(row, "grounding", "regions", where)
    return _boxes(regions, where), [fields.text(region, "phrase", where) for region in regions]


def _objects(row: Mapping[str, Any], key: str, inner: str, where: str) -> list[dict[str, Any]]:
    part = row.get(key)
    objects = part.get(inner) if isinstance(part, dict) else None
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise InputError(f"{where}: {key!r} must hold a list {inner!r} of objects; {ODVG_HINT}")
    return objects


def _boxes(objects: list[dict[str, Any]], where: str) -> list[list[float]]:
    return fields.boxes({"bbox": [one.get("bbox") for one in objects]}, "bbox", where)


def _read_label_map(file: Path) -> dict[str, str]:
    names = fields.read_json(file, 'a label map is {"0": "person", …}')
    if not isinstance(names, dict) or not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise InputError(f'{file} is no label map: it must map label numbers to names, {{"0": "person", …}}')
    return names
