"""Pictures with every box that is known, for training a detector: from training data, or from a COCO-format set.

load_detections("data/kitchen")                               # a folder with data.jsonl: the union of its records
load_detections("coco/annotations.json", images="coco/train2017")
load_detections("coco")                                       # holds annotations.json, and the pictures in images/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detgpt.errors import InputError
from detgpt.evaluation.coco import Picture, find_image, read_annotations
from detgpt.evaluation.readers.coco import ANNOTATIONS_FILE, image_folder
from finetune.data import records
from finetune.data.records import Paths, data_files, read_records

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]


def load_detections(path: Paths, *, images: str | Path | None = None) -> Dataset:
    """One record a picture, in the order of first mention.

    Columns: image, its path; boxes (N, 4) xyxy in pixels and labels, one each; ignored and ignored_labels, regions
    such as crowds where a box is neither right nor wrong; present, the names of everything that is known to be in
    the picture. A name in `present` without a box is there, but nobody boxed it: it is no negative.

    images: the folder of a COCO-format set's pictures; else images/ beside the annotation, else beside it.
    Raises `InputError` for data that is wrong, without a box, or whose picture is not there.
    """
    from datasets import Dataset, Features, List, Value

    rows = list(read_detections(path, images=images))
    if not any(row["boxes"] for row in rows):
        raise InputError(f"{path} has no box to train a detector with")
    names, boxes = List(Value("string")), List(List(Value("float64")))
    types = {"image": Value("string"), "boxes": boxes, "labels": names, "present": names}
    return Dataset.from_list(rows, features=Features(types | {"ignored": boxes, "ignored_labels": names}))


def read_detections(path: Paths, *, images: str | Path | None = None) -> Iterator[Row]:
    """The same as plain dicts, without 🤗 datasets."""
    annotations = _annotation_file(path)
    if annotations is not None:
        return _of_coco(annotations, Path(images) if images is not None else image_folder(annotations.parent))
    if images is not None:
        raise InputError(f"{data_files(path)[0]} says where its pictures are: leave images out")
    return iter(_of_records(path).values())


def fingerprint(path: Paths, *, images: str | Path | None = None) -> str:
    """As `records.fingerprint`, for everything that `load_detections` reads."""
    file = _annotation_file(path)
    if file is None:
        return records.fingerprint(path)
    folder = Path(images) if images is not None else image_folder(file.parent)
    names = [picture.file_name for picture in read_annotations(file).pictures]
    return records.files_digest(file, [(name, find_image(folder, name)) for name in names]).hex()


def coco_row(picture: Picture, image: str) -> Row:
    """What is annotated in `picture`, whose file is `image`, as a record of boxes alone; crowds are ignored."""
    single = [thing for thing in picture.things if not thing.crowd]
    crowds = [thing for thing in picture.things if thing.crowd]
    return {
        "image": image,
        "boxes": [list(thing.box) for thing in single],
        "labels": [thing.label for thing in single],
        "present": list(picture.present),
        "ignored": [list(thing.box) for thing in crowds],
        "ignored_labels": [thing.label for thing in crowds],
    }


def _annotation_file(path: Paths) -> Path | None:
    if not isinstance(path, (str, Path)):
        return None
    file = Path(path) / ANNOTATIONS_FILE if Path(path).is_dir() else Path(path)
    return file if file.is_file() and file.suffix == ".json" else None


def _of_coco(file: Path, folder: Path) -> Iterator[Row]:
    for picture in read_annotations(file).pictures:
        image = find_image(folder, picture.file_name)
        if not image.is_file():
            raise InputError(f"{file}: there is no image {image} of picture {picture.id!r}")
        yield coco_row(picture, str(image))


def _of_records(path: Paths) -> dict[str, Row]:
    """For each picture the union of what its records know; the same box counts once."""
    union: dict[str, Row] = {}
    for record in read_records(path):
        if record["boxes"] is None:
            continue
        empty: Row = {key: [] for key in ("boxes", "labels", "present", "ignored", "ignored_labels")}
        row = union.setdefault(record["image"], {"image": record["image"], **empty})
        for boxes, labels in (("boxes", "labels"), ("ignored", "ignored_labels")):
            known = list(zip(row[labels], row[boxes], strict=True))
            for label, box in zip(record[labels], record[boxes], strict=True):
                if (label, box) not in known:
                    row[labels].append(label)
                    row[boxes].append(box)
        row["present"] += [name for name in record["present"] if name not in row["present"]]
    return union
