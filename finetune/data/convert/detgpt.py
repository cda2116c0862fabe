"""The original DetGPT's `coco_task_annotation.json`: wishes, and whole answers of a language model.

    {"annotations": [{"image_id": "000000000042", "task": "I am thirsty", "answer": "... the answer is: [cup, mug]"}]}

The text in front of the answer line becomes the reasoning. With --annotations, a COCO file, the targets are what the
answer names and the picture has boxes of; other names are dropped, and a wish of which nothing is left, too, unless
the answer says itself that nothing fits. Without it the answer's names are the targets, and there are no boxes.
"""

from __future__ import annotations

from pathlib import Path

from detgpt.answer import ParsedAnswer, parse_answer
from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import Annotations, find_image, read_annotations
from detgpt.evaluation.readers import Source
from detgpt.evaluation.readers.coco import image_folder
from detgpt.evaluation.readers.folder import to_row
from detgpt.evaluation.writing import Names
from finetune.data.convert import Converted
from finetune.data.records import Row

USES = frozenset({"annotations", "images"})
HINT = "coco_task_annotation.json holds 'annotations' with 'image_id', 'task' and 'answer'"


def convert(source: Source) -> Converted:
    document = fields.read_json(source.path, HINT)
    wishes = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(wishes, list) or not all(isinstance(wish, dict) for wish in wishes):
        raise InputError(f"{source.path} is something else: {HINT}")
    annotations = read_annotations(source.annotations) if source.annotations else None
    folder = source.images or image_folder(source.path.parent)
    rows: list[Row] = []
    dropped = 0
    for number, wish in enumerate(wishes):
        where = f"{source.path}, annotation {number}"
        instruction = fields.text(wish, "task", where)
        answer = parse_answer(fields.text(wish, "answer", where, default=""))
        row, lost = _row(wish.get("image_id"), instruction, answer, annotations, folder, where)
        dropped += lost
        rows += [row] if row else []
    left_out = len(wishes) - len(rows)
    return Converted.of(
        rows,
        *(annotations.notes if annotations else ()),
        f"{left_out} of {len(wishes)} wishes have no target left and were left out." if left_out else "",
        f"{dropped} names have no box in their picture and were dropped." if dropped else "",
        "" if annotations else "There are no boxes: --annotations takes the COCO file that has them.",
    )


def _row(
    image_id: object,
    instruction: str,
    answer: ParsedAnswer,
    annotations: Annotations | None,
    folder: Path,
    where: str,
) -> tuple[Row | None, int]:
    """The record, if there is one, and how many names were dropped."""
    if answer.problem:
        return None, 0
    if annotations is None:
        image = find_image(folder, f"{image_id!s:0>12}.jpg")
        said: Row = {"instruction": instruction, "targets": list(answer.names), "reasoning": answer.reasoning}
        return {"image": str(image), **said}, 0
    picture = annotations.picture(image_id, where)
    names = Names(picture.boxed, annotations.synonyms)
    found = [names.find(name) for name in answer.names]
    targets = tuple(dict.fromkeys(target for target in found if target))
    if answer.names and not targets:
        return None, len(found)
    record = picture.record(folder, instruction, targets, where)
    return to_row(record, str(record.image)) | {"reasoning": answer.reasoning}, found.count(None)
