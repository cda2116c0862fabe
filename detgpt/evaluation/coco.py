"""A COCO-format annotation file (COCO, LVIS, Objects365, ...): what stands where in which picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.data import Record, box_array
from detgpt.evaluation.outlines import Outline, Outlines, checked_segmentation


@dataclass(frozen=True)
class Thing:
    """One annotation: its category's name, its box xyxy, whether it is a crowd, and its outline if there is one."""

    id: Any
    label: str
    box: tuple[float, float, float, float]
    crowd: bool = False
    segmentation: Any = None


@dataclass(frozen=True)
class Picture:
    """An annotated picture. `file_name` as the annotation has it."""

    id: Any
    file_name: str
    things: tuple[Thing, ...]

    @property
    def present(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(thing.label for thing in self.things))

    @property
    def boxed(self) -> tuple[str, ...]:
        """The names of which at least one thing stands by itself, not in a crowd."""
        return tuple(dict.fromkeys(thing.label for thing in self.things if not thing.crowd))

    def record(self, folder: Path, instruction: str, targets: tuple[str, ...], where: str, **more: Any) -> Record:
        """A record about this picture whose truth is everything that one of `targets` names.

        Crowds are ignored regions, as in COCO's own evaluation. Raises `InputError` for a target that is not there.
        """
        if strangers := sorted(set(targets) - set(self.boxed)):
            raise InputError(
                f"{where}: targets {strangers} have no box of their own in picture {self.id!r}, "
                f"which has {list(self.boxed)}"
            )
        things = [thing for thing in self.things if thing.label in targets]
        return self.record_of(things, folder, instruction, targets, where, **more)

    def record_of(
        self,
        things: list[Thing],
        folder: Path,
        instruction: str,
        targets: tuple[str, ...],
        where: str,
        **more: Any,
    ) -> Record:
        """A record whose truth is exactly these `things`."""
        true = [thing for thing in things if not thing.crowd]
        crowds = [thing for thing in things if thing.crowd]
        return Record(
            image=find_image(folder, self.file_name),
            instruction=instruction,
            targets=targets,
            boxes=box_array(thing.box for thing in true),
            labels=tuple(thing.label for thing in true),
            present=self.present,
            ignored=box_array(thing.box for thing in crowds),
            ignored_labels=tuple(thing.label for thing in crowds),
            outlines=_outlines([*crowds, *true], where),  # where a thing stands in a crowd, it is the thing that counts
            where=where,
            **more,
        )


@dataclass(frozen=True)
class Annotations:
    """The pictures of one annotation file in its order.

    synonyms: for a category, the other names that the file gives it (LVIS does).
    without_area: how many annotations were left out because their box has none.
    """

    file: Path
    pictures: tuple[Picture, ...]
    categories: tuple[str, ...]
    synonyms: Mapping[str, tuple[str, ...]]
    without_area: int = 0

    @cached_property
    def _by_id(self) -> dict[str, Picture]:
        return {str(picture.id): picture for picture in self.pictures}

    @cached_property
    def _by_file(self) -> dict[str, Picture]:
        names = {Path(picture.file_name).name: picture for picture in self.pictures}
        return names | {picture.file_name: picture for picture in self.pictures}

    def picture(self, key: Any, where: str) -> Picture:
        """The picture of that id, or of that file name. Raises `InputError` where there is none."""
        named = str(key)
        unpadded = named.lstrip("0") or "0"  # "000000000042" is how many files write 42
        found = self._by_id.get(named) or self._by_file.get(named) or self._by_id.get(unpadded)
        if found is None:
            raise InputError(f"{where}: {self.file} has no picture {key!r}, by id or by file name")
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        left_out = f"{self.without_area} annotations of {self.file.name} have a box without area and were left out."
        return (left_out,) if self.without_area else ()


def read_annotations(file: Path) -> Annotations:
    """Read a COCO-format annotation file. Raises `InputError` that names the entry that is wrong."""
    hint = "a COCO annotation file holds images, annotations and categories"
    document = fields.read_json(file, hint)
    if not isinstance(document, dict) or not all(
        isinstance(document.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise InputError(f"{file} is no annotation file: {hint}")
    try:
        categories = {row["id"]: str(row["name"]) for row in document["categories"]}
        synonyms = {str(row["name"]): _other_names(row) for row in document["categories"] if row.get("synonyms")}
        files = {row["id"]: _file_name(row) for row in document["images"]}
        things: dict[Any, list[Thing]] = {image_id: [] for image_id in files}
        without_area = 0
        for thing, image_id in _things(document["annotations"], categories, file):
            if not fields.is_box(list(thing.box)):
                without_area += 1
            elif image_id in things:  # a subset of the pictures often comes with the annotations of all
                things[image_id].append(thing)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} has an entry that is not of COCO's form ({error!r}): {hint}") from error
    pictures = tuple(Picture(image_id, name, tuple(things[image_id])) for image_id, name in files.items())
    return Annotations(file, pictures, tuple(categories.values()), synonyms, without_area)


def find_image(folder: Path, file_name: str) -> Path:
    """`file_name` in `folder`, or its last part where the annotation names folders that are not there."""
    image = folder / file_name
    return image if image.is_file() else folder / Path(file_name).name


def _things(rows: list[Any], categories: Mapping[Any, str], file: Path) -> Iterator[tuple[Thing, Any]]:
    for row in rows:
        x, y, width, height = (float(value) for value in row["bbox"])
        if not all(map(math.isfinite, (x, y, width, height))):
            raise InputError(f"{file}: annotation {row.get('id')!r} has a bbox that is not finite: {row['bbox']}")
        label, segmentation = categories[row["category_id"]], row.get("segmentation") or None
        box = (x, y, x + width, y + height)
        yield Thing(row.get("id"), label, box, bool(row.get("iscrowd", 0)), segmentation), row["image_id"]


def _file_name(row: Mapping[str, Any]) -> str:
    return str(row["file_name"] if "file_name" in row else row["coco_url"].rpartition("/")[2])


def _other_names(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(name) for name in row["synonyms"] if name != row["name"])


def _outlines(things: list[Thing], where: str) -> Outlines | None:
    """The outlines of all `things`; None unless each has one. Nothing has none, and so is empty."""
    if any(thing.segmentation is None for thing in things):
        return None
    layers = (Outline(checked_segmentation(thing.segmentation, where), thing.crowd) for thing in things)
    return Outlines(tuple(layers))
