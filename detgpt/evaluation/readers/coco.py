"""A COCO-format annotation file, and beside it the wishes: JSON lines that name a picture and what fits.

    {"image_id": 42, "instruction": "I am thirsty", "targets": ["bottle", "cup"]}
    {"image": "000000000042.jpg", "instruction": "I want to swim", "targets": [], "kind": "absent"}

The picture is named by its id or its file name, the targets by categories of the annotation; the boxes (and
outlines) are all those of these categories in the picture, its crowds are ignored. Optional: `kind`, and
`synonyms` {target: [names]} that are as right as the target's own.

The path is the file of wishes, with --annotations; or a folder with `instructions.jsonl` and
`annotations.json`. The pictures lie in --images, else in `images/` beside the wishes, else beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import read_annotations
from detgpt.evaluation.data import Dataset, Record

if TYPE_CHECKING:
    from detgpt.evaluation.readers import Source

WISHES_FILE, ANNOTATIONS_FILE = "instructions.jsonl", "annotations.json"
USES = frozenset({"annotations", "images"})


def recognises(path: Path) -> bool:
    return (path / WISHES_FILE).is_file() or (path.is_file() and path.suffix == ".jsonl")


def read(source: Source) -> Dataset:
    file = source.path / WISHES_FILE if source.path.is_dir() else source.path
    annotations = read_annotations(source.annotations or file.parent / ANNOTATIONS_FILE)
    folder = source.images or image_folder(file.parent)
    records: list[Record] = []
    for where, row in fields.read_rows(file, "a file of wishes is JSON lines in UTF-8"):
        if "image_id" not in row and "image" not in row:
            raise InputError(f"{where}: name the picture by its 'image_id', or by its file name as 'image'")
        picture = annotations.picture(row.get("image_id", row.get("image")), where)
        targets = tuple(dict.fromkeys(fields.names(row, "targets", where)))
        others = {name: annotations.synonyms[name] for name in targets if name in annotations.synonyms}
        records.append(
            picture.record(
                folder,
                fields.text(row, "instruction", where),
                targets,
                where,
                kind=fields.text(row, "kind", where, default=""),
                synonyms=others | fields.synonyms(row, where),
            )
        )
    return Dataset(tuple(records), annotations.notes)


def image_folder(folder: Path) -> Path:
    """Where the pictures of a set in `folder` lie, unless it was said."""
    return folder / "images" if (folder / "images").is_dir() else folder
