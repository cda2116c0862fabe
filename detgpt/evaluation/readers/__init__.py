"""Evaluation sets as they are found on disk. One file here is one format, and its name is the `format`.

    read_dataset("splits/seen")                                          # the format is seen from what is there
    read_dataset("refcoco/refs(unc).p", split="testA", images="train2014")

A format's file has `recognises(path)`, `USES` (which of annotations, images and split it takes) and
`read(source)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from detgpt.errors import InputError
from detgpt.evaluation.data import Dataset

FORMATS = ("folder", "coco", "refcoco", "reasonseg", "detgpt")


@dataclass(frozen=True)
class Source:
    """Where a dataset lies.

    path: its file or folder. annotations: a COCO annotation file. images: the folder of the pictures.
    split: the part to read, where one file holds several.
    """

    path: Path
    annotations: Path | None = None
    images: Path | None = None
    split: str | None = None


def read_dataset(
    path: str | Path,
    *,
    format: str | None = None,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """The records at `path`, the first `limit` of them; `format` (one of `FORMATS`) is found unless given.

    Raises `InputError`, which names the file and the line, for data that is wrong or not there.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit!r} leaves no record: give 1 or more, or None for all")
    source = Source(Path(path), _path(annotations), _path(images), split)
    reader = _reader(source.path, format)
    given = {name for name in ("annotations", "images", "split") if getattr(source, name) is not None}
    if unused := sorted(given - reader.USES):
        kind = reader.__name__.rpartition(".")[2]
        raise InputError(f"{path} is read as {kind!r}, which takes no {' and no '.join(unused)}: leave it out")
    dataset: Dataset = reader.read(source)
    if not dataset.records:
        raise InputError(f"{path} holds no wish that could be measured. {' '.join(dataset.notes)}".strip())
    records = dataset.records[:limit]
    for record in records:
        if not record.image.is_file():
            raise InputError(f"{record.where}: there is no image {record.image}")
    return replace(dataset, records=records)


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place)


def _reader(path: Path, format: str | None) -> Any:
    if format is not None and format not in FORMATS:
        raise InputError(f"there is no format {format!r}: choose one of {', '.join(FORMATS)}")
    if not path.exists():
        raise InputError(f"there is no {path}: give the folder or file of an evaluation set")
    for name in [format] if format else FORMATS:
        reader = import_module(f"{__name__}.{name}")
        if format or reader.recognises(path):
            return reader
    raise InputError(
        f"{path} looks like no known evaluation set (a folder with data.jsonl, or one of "
        f"{', '.join(FORMATS[1:])}): name its format"
    )
