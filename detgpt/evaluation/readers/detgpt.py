"""The original DetGPT's formats.

Its annotation, `coco_task_annotation.json`, has questions and whole answers of a language model:

    {"annotations": [{"image_id": "000000000042", "task": "I am thirsty", "answer": "... [cup, mug]"}]}

It has no boxes: they are those of the COCO file that --annotations gives, of the categories that the answer
names. A name that is no category with a box in its picture is dropped, as its own builder does; a wish of which
nothing is left is left out, unless the answer says itself that nothing fits.

Its benchmark, as `build_benchmark` writes it, is a COCO file with `instruct_task1`, `annotations_task1` and so
on beside the categories; --split names the task, task1 unless given. Each wish's targets are the categories
that a language model chose: nobody checked them, so a number on it says less than one on checked truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detgpt.answer import parse_answer
from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import Annotations, read_annotations
from detgpt.evaluation.data import Dataset, Record
from detgpt.evaluation.readers.coco import image_folder

if TYPE_CHECKING:
    from detgpt.evaluation.readers import Source

USES = frozenset({"annotations", "images", "split"})
DEFAULT_SPLIT = "task1"
HINT = "DetGPT's files hold 'annotations' with 'task' and 'answer', or 'instruct_task1'"

Wish = tuple[Any, str, Sequence[str], bool, str]  # image id, instruction, names, whether "nothing" was said, where


def recognises(path: Path) -> bool:
    if not path.is_file() or path.suffix != ".json":
        return False
    document = fields.read_json(path, HINT)
    return isinstance(document, dict) and (_is_benchmark(document) or _are_answers(document))


def read(source: Source) -> Dataset:
    file, document = source.path, fields.read_json(source.path, HINT)
    if not isinstance(document, dict) or not (_is_benchmark(document) or _are_answers(document)):
        raise InputError(f"{file} is something else: {HINT}")
    if _is_benchmark(document):
        annotations = read_annotations(source.annotations or file)
        there = {str(picture.id) for picture in annotations.pictures}  # a subset keeps the wishes of all pictures
        wishes = [wish for wish in _chosen(document, source.split or DEFAULT_SPLIT, file) if wish[0] in there]
    else:
        if source.annotations is None:
            raise InputError(f"{file} has no boxes: give the COCO file that has them as annotations")
        annotations = read_annotations(source.annotations)
        wishes = list(_answered(document, file))
    folder = source.images or image_folder(file.parent)
    records = [record for record in (_record(wish, annotations, folder) for wish in wishes) if record]
    lost = len(wishes) - len(records)
    note = f"{lost} of {len(wishes)} wishes name nothing that has a box in its picture and were left out."
    return Dataset(tuple(records), (*annotations.notes, *([note] if lost else [])))


def _record(wish: Wish, annotations: Annotations, folder: Path) -> Record | None:
    image_id, instruction, names, says_nothing, where = wish
    picture = annotations.picture(image_id, where)
    wanted = {name.casefold() for name in names}
    targets = tuple(label for label in picture.boxed if label.casefold() in wanted)
    if not targets and not says_nothing:
        return None
    return picture.record(folder, instruction, targets, where)


def _answered(document: dict[str, Any], file: Path) -> Iterator[Wish]:
    for number, row in enumerate(document["annotations"]):
        where = f"{file}, annotation {number}"
        answer = parse_answer(fields.text(row, "answer", where, default=""))
        says_nothing = answer.problem is None and not answer.names
        yield row.get("image_id"), fields.text(row, "task", where), answer.names, says_nothing, where


def _chosen(document: dict[str, Any], split: str, file: Path) -> Iterator[Wish]:
    tasks = sorted(key.removeprefix("instruct_") for key in document if key.startswith("instruct_"))
    if split not in tasks or not isinstance(document[f"instruct_{split}"], dict):
        raise InputError(f"{file} has no wishes of {split!r}: choose one of {', '.join(tasks)}")
    for image_id, row in document[f"instruct_{split}"].items():
        where = f"{file}, {split} of image {image_id}"
        if not isinstance(row, dict):
            raise InputError(f"{where}: a wish is an object with 'task' and 'categories', got {row!r}")
        yield image_id, fields.text(row, "task", where), fields.names(row, "categories", where), False, where


def _is_benchmark(document: dict[str, Any]) -> bool:
    return any(key.startswith("instruct_") for key in document)


def _are_answers(document: dict[str, Any]) -> bool:
    rows = document.get("annotations")
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and "task" in row for row in rows)
