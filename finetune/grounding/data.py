"""Annotated pictures for a detector's training, from the formats that Grounding DINO's users have.

    Source(annotations="train.json", images="train2017").read()           # COCO: also LVIS, Objects365, …
    Source(annotations="odvg.jsonl", images="train", label_map="names.json").read()       # as Open-GroundingDINO has it
    Source(annotations="data/kitchen").read()     # a folder with annotations.json and images/, or with data.jsonl

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
from pydantic import model_validator

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import Picture, find_image, read_annotations
from detgpt.evaluation.data import box_array
from detgpt.evaluation.readers.coco import ANNOTATIONS_FILE, image_folder
from finetune.data.detections import read_detections
from finetune.data.records import DATA_FILE, files_digest
from finetune.recipe import Settings

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


class Source(Settings):
    """Where annotated pictures are.

    annotations: a COCO file (.json), an ODVG file (.jsonl), or a folder with COCO's annotations.json or with
    data.jsonl, the project's own records. images: the folder of the pictures of a COCO or ODVG file; unset: images/
    beside it, else where it is. label_map: for ODVG, a JSON file of label numbers to names, `{"0": "person", …}`;
    without it the names are those that occur.
    """

    annotations: Path
    images: Path | None = None
    label_map: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_path(cls, value: Any) -> Any:
        return {"annotations": value} if isinstance(value, (str, Path)) else value

    @property
    def file(self) -> Path:
        """The file of the annotations."""
        if not self.annotations.is_dir():
            return self.annotations
        coco = self.annotations / ANNOTATIONS_FILE
        return coco if coco.is_file() else self.annotations / DATA_FILE

    def read(self) -> list[Example]:
        """Raises `InputError` for an entry that is wrong, a picture that is missing, and a set without a box."""
        file, images = self.file, self.images or image_folder(self.file.parent)
        if file.suffix == ".jsonl" and self.annotations.is_dir():
            examples = list(_read_records(self.annotations))
        elif file.suffix == ".jsonl":
            examples = list(_read_odvg(file, images, self.label_map))
        else:
            examples = list(_read_coco(file, images))
        for example in examples:
            if not example.image.is_file():
                raise InputError(f"{file}: there is no picture {example.image}; 'images' is the folder they are in")
        if not any(len(example.boxes) for example in examples):
            raise InputError(f"{file} has no box to learn from")
        return examples

    def fingerprint(self) -> str:
        """A SHA-256 of the annotations; not of the pictures, which may be hundreds of thousands."""
        return files_digest(self.file, ()).hex()


def _read_records(folder: Path) -> Iterator[Example]:
    rows = list(read_detections(folder))
    names = tuple(dict.fromkeys(label for row in rows for label in row["labels"]))
    for row in rows:
        unboxed = set(row["present"]) - set(row["labels"]) - set(row["ignored_labels"])
        yield Example(
            image=Path(row["image"]),
            boxes=box_array(row["boxes"]),
            labels=tuple(row["labels"]),
            vocabulary=Vocabulary(tuple(name for name in names if name not in unboxed)),
            ignored=box_array(row["ignored"]),
            ignored_labels=tuple(row["ignored_labels"]),
        )


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
